"""The functions of Python modules that a patch functor replaces in traced code and restores."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import BlockAdapter
from cachedit_fx.errors import ConfigError, NoMatchError
from cachedit_fx.functors import PatchFunctor
from tests import hybrid, original_wan
from tests.original_wan import Wan, WanPatchFunctor, calls, rope_apply_without_reading
from tests.researchers.port_reference import HIDDEN, PortReference
from tests.sessions import every_session

ORIGINAL = original_wan.rope_apply
PLACE = "tests.original_wan:rope_apply"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    gc.collect()
    assert original_wan.rope_apply is ORIGINAL


def enable(model: nn.Module, functor: PatchFunctor | None = None, **fields: Any) -> nn.Module:
    config = hybrid.config(max_continuous_cached_steps=2, residual_diff_threshold=10.0, **fields)
    cachedit_fx.enable_cache(BlockAdapter(transformer=model, patch_functor=functor), config)
    return model


def disable(model: nn.Module) -> None:
    cachedit_fx.disable_cache(model)


def generate(model: nn.Module) -> list[list[Tensor]]:
    return [model(**call) for call in calls()]


def test_both_functions_return_the_same():
    generator = torch.Generator().manual_seed(1)
    x, sizes = torch.randn(2, 14, 2, 12, generator=generator), torch.tensor([[2, 2, 2], [2, 2, 3]])
    freqs = original_wan.rope_params(64, 12)
    torch.testing.assert_close(rope_apply_without_reading(x, sizes, freqs), ORIGINAL(x, sizes, freqs), rtol=0, atol=0)


def test_the_model_is_not_cached_without_the_functor():
    model = enable(hybrid.build(Wan), on_no_match="raise")
    with pytest.raises(NoMatchError, match=r"the first graph ends at original_wan\.py:\d+"):
        generate(model)
    disable(model)


def test_the_model_is_cached_with_the_functor():
    model = enable(hybrid.build(Wan), WanPatchFunctor(), on_no_match="raise")
    outputs = generate(model)
    (stats,) = every_session(model)
    assert (stats.region, stats.cached_steps) == ("blocks[1:4]", [1, 2, 4, 5])
    plain = hybrid.build(Wan)
    reference = PortReference(plain, [*plain.blocks], HIDDEN, 1, 0)
    for step, (call, output) in enumerate(zip(calls(), outputs, strict=True)):
        expected = reference.step(lambda model, call=call: model(**call), reuse=step in stats.cached_steps)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    disable(model)


def test_explain_replaces_the_function_and_restores_it():
    adapter = BlockAdapter(transformer=hybrid.build(Wan), patch_functor=WanPatchFunctor())
    assert cachedit_fx.explain(adapter, **calls()[0]).is_cached
    assert original_wan.rope_apply is ORIGINAL


def test_code_that_is_not_traced_calls_the_original():
    called = []

    def replacement(*args: Tensor) -> Tensor:
        called.append(torch.compiler.is_compiling())
        return rope_apply_without_reading(*args)

    model, other = hybrid.build(Wan), hybrid.build(Wan)
    functor = PatchFunctor()
    functor.replace_function(model, "rope_apply", replacement)
    other(**calls()[0])
    assert called == []
    assert original_wan.rope_apply.__name__ == "rope_apply"
    functor.restore(model)


def test_disable_cache_restores_the_function():
    model = enable(hybrid.build(Wan), WanPatchFunctor())
    assert original_wan.rope_apply is not ORIGINAL
    disable(model)
    assert original_wan.rope_apply is ORIGINAL


def test_the_function_is_restored_after_the_last_model():
    first, second = (enable(hybrid.build(Wan), WanPatchFunctor()) for _ in range(2))
    disable(first)
    assert original_wan.rope_apply is not ORIGINAL
    generate(second)
    assert every_session(second)[0].cached_steps == [1, 2, 4, 5]
    disable(second)
    assert original_wan.rope_apply is ORIGINAL


def test_a_deleted_model_restores_the_function():
    model, functor = hybrid.build(Wan), WanPatchFunctor()
    functor.prepare(model)
    assert original_wan.rope_apply is not ORIGINAL
    del model
    gc.collect()
    assert original_wan.rope_apply is ORIGINAL


def test_a_function_that_was_replaced_by_others_meanwhile_is_left_alone():
    model, functor = hybrid.build(Wan), WanPatchFunctor()
    functor.prepare(model)
    installed, theirs = original_wan.rope_apply, lambda x, grid_sizes, freqs: x
    original_wan.rope_apply = theirs
    functor.restore(model)
    assert original_wan.rope_apply is theirs is not installed
    original_wan.rope_apply = ORIGINAL


def test_a_functor_that_fails_to_prepare_restores_the_function():
    class Halfway(WanPatchFunctor):
        def prepare(self, transformer: nn.Module) -> None:
            super().prepare(transformer)
            self.replace_method(transformer, "no_such_method", rope_apply_without_reading)

    adapter = BlockAdapter(transformer=hybrid.build(Wan), patch_functor=Halfway())
    for use in (enable_adapter, explain_adapter):
        with pytest.raises(ConfigError, match="no_such_method"):
            use(adapter)
        assert original_wan.rope_apply is ORIGINAL


def enable_adapter(adapter: BlockAdapter) -> None:
    cachedit_fx.enable_cache(adapter, hybrid.config())


def explain_adapter(adapter: BlockAdapter) -> None:
    cachedit_fx.explain(adapter, **calls()[0])


def test_another_function_for_another_model_is_refused():
    model, other = hybrid.build(Wan), hybrid.build(Wan)
    functor = WanPatchFunctor()
    functor.prepare(model)
    with pytest.raises(ConfigError, match="is already replaced for another model"):
        PatchFunctor().replace_function(other, PLACE, lambda *args: args[0])
    functor.restore(model)
    assert original_wan.rope_apply is ORIGINAL


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("tests.original_wan:rope_aply", "has no function 'rope_aply' to replace.*Did you mean 'rope_apply'?"),
        ("rope_aply", "the module tests.original_wan has no function.*Did you mean 'rope_apply'?"),
        ("tests.original_wan:DIM", "has no function 'DIM'"),
        ("no.such.module:rope_apply", "there is no module 'no.such.module'"),
    ],
)
def test_a_missing_function_raises_an_error(place: str, says: str):
    with pytest.raises(ConfigError, match=says):
        PatchFunctor().replace_function(hybrid.build(Wan), place, rope_apply_without_reading)


def test_threads_replace_and_restore_the_function_at_the_same_time():
    models = [hybrid.build(Wan) for _ in range(4)]
    errors: list[BaseException] = []

    def work(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            functor = WanPatchFunctor()
            try:
                for _ in range(300):
                    functor.prepare(model)
                    assert original_wan.rope_apply is not ORIGINAL
                    functor.restore(model)
            except BaseException as error:
                errors.append(error)

        return run

    threads = [threading.Thread(target=work(model)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert original_wan.rope_apply is ORIGINAL
