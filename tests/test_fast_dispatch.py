"""Fast dispatch: outputs are the same as with Dynamo, and calls that fail a guard of Dynamo go to Dynamo.

A reused step runs only the Fn blocks, so it may not detect a change of other blocks; the next computed step does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.runtime.instances import end_generation
from tests import tiny
from tests.fast_dispatches import enabled, last, served, warm
from tests.models import FLUX, denoise


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def by_dynamo(module: nn.Module, prompt: Tensor, latents: Tensor, **others: Any) -> list[Tensor]:
    """The outputs of a generation with `torch.compile`, without fast dispatch."""
    torch._dynamo.reset()
    backend = cachedit_fx.Backend(tiny.config(**others))
    return tiny.generate(torch.compile(copy.deepcopy(module), backend=backend, fullgraph=True), prompt, latents)


# The same outputs as with Dynamo.


@pytest.mark.parametrize("others", [{}, {"Bn_compute_blocks": 1}, {"Fn_compute_blocks": 2}], ids=str)
def test_the_outputs_are_bitwise_those_of_dynamo(others):
    expected = by_dynamo(tiny.build(), tiny.prompt(), tiny.latents(), **others)
    module = warm(tiny.build(), **others)
    with served(module) as calls:
        outputs = tiny.generate(module, tiny.prompt(), tiny.latents())
    assert calls == [True] * len(tiny.TIMES)
    tiny.assert_bitwise(outputs, expected)
    assert 0 < len(last(module).cached_steps) < len(tiny.TIMES)


def test_a_real_transformer_is_served_with_the_same_outputs():
    plain, module = FLUX.build(), FLUX.build()
    fields = dict(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=FLUX.threshold)
    backend = cachedit_fx.Backend(cachedit_fx.CacheConfig(**fields, inner_backend="eager"))
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    prompt, latents = FLUX.prompt(0), FLUX.latents(0)
    expected = denoise(lambda _, **inputs: compiled(**inputs)[0], FLUX, prompt, latents, 8)
    cachedit_fx.enable_cache(module, **fields, inner_backend="eager")
    with served(module) as calls:
        output = denoise(lambda _, **inputs: module(**inputs)[0], FLUX, prompt, latents, 8)
    assert calls == [False] + [True] * 7
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_a_reused_step_runs_no_block_of_the_region():
    module = warm(tiny.build())
    with served(module) as calls:
        ran = [tiny.ran_blocks(module, prompt, t, tiny.latents()) for prompt in [tiny.prompt()] for t in tiny.TIMES]
    assert all(calls)
    assert {*ran} == {1, tiny.NUM_BLOCKS}


def test_every_call_returns_a_new_output_object():
    module = FLUX.build()
    cachedit_fx.enable_cache(module, inner_backend="eager", Fn_compute_blocks=1)
    prompt, latents = FLUX.prompt(0), FLUX.latents(0)
    inputs = dict(hidden_states=latents, timestep=torch.full((len(latents),), 0.5), **prompt.cond)
    inputs.pop("return_dict", None)
    first = module(**inputs, return_dict=True)
    with served(module) as calls:
        second = module(**inputs, return_dict=True)
    assert calls == [True]
    assert type(second) is type(first)
    torch.testing.assert_close(second.sample, first.sample, rtol=0, atol=0)
    assert second is not first


# Changes that Dynamo's guards detect.


def changes_of_inputs() -> list[Any]:
    long = tiny.latents(tokens=9)
    return [
        pytest.param(dict(hidden_states=long), id="shape"),
        pytest.param(dict(encoder_hidden_states=tiny.prompt(length=3)), id="prompt-length"),
        pytest.param(dict(hidden_states=tiny.latents().transpose(0, 1).contiguous().transpose(0, 1)), id="strides"),
        pytest.param(dict(timestep=torch.full((2,), 0.5, dtype=torch.float64)), id="dtype"),
    ]


@pytest.mark.parametrize("changed", changes_of_inputs())
def test_calls_with_other_inputs_go_to_dynamo(changed):
    module, plain = warm(tiny.build()), tiny.build()
    inputs = dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=torch.full((2,), 0.5))
    with served(module) as calls:
        output = module(**inputs | changed)[0]
    assert calls == [False]
    torch.testing.assert_close(output, plain(**inputs | changed)[0], rtol=0, atol=0)


def test_two_sizes_are_both_served_once_they_are_compiled():
    module = warm(tiny.build())
    short, long = tiny.latents(), tiny.latents(tokens=9)
    tiny.generate(module, tiny.prompt(), long)
    with served(module) as calls:
        for latents in (short, long, short):
            end_generation(module)
            tiny.assert_bitwise(
                [tiny.step(module, tiny.prompt(), 1.0, latents)], [tiny.step(tiny.build(), tiny.prompt(), 1.0, latents)]
            )
    assert calls == [True, True, True]


def test_only_the_guards_of_the_current_graph_are_checked():
    """Dynamo's cache also holds a graph of an earlier configuration with dynamic sizes, whose guards pass as well."""
    module, long = tiny.build(), tiny.latents(tokens=9)
    cachedit_fx.enable_cache(module, **tiny.fields(), inner_backend="eager", dynamic=True)
    for latents in (tiny.latents(), long):
        tiny.generate(module, tiny.prompt(), latents)
    cachedit_fx.disable_cache(module)
    cachedit_fx.enable_cache(module, **tiny.fields(Fn_compute_blocks=2), inner_backend="eager", dynamic=False)
    tiny.generate(module, tiny.prompt(), tiny.latents())
    with served(module) as calls:
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
        output = tiny.step(module, tiny.prompt(), 1.0, long)
    assert calls == [True, False]
    torch.testing.assert_close(output, tiny.step(tiny.build(), tiny.prompt(), 1.0, long), rtol=0, atol=0)


def test_calls_with_gradients_go_to_dynamo():
    module = warm(tiny.build())
    with served(module) as calls, torch.enable_grad():
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert calls == [False]


def replaced(module: nn.Module) -> None:
    module.proj_out = nn.Linear(tiny.WIDTH, 4, bias=False).requires_grad_(False)


def fewer_blocks(module: nn.Module) -> None:
    del module.blocks[-1]


def wider(module: nn.Module) -> None:
    module.blocks[2].image.bias = None


def no_bias_in_front(module: nn.Module) -> None:
    module.blocks[0].image.bias = None


@pytest.mark.parametrize("change", [replaced, fewer_blocks, wider, no_bias_in_front])
def test_a_module_that_changed_goes_to_dynamo(change: Callable[[nn.Module], None]):
    """At once if a reused step can detect the change, and otherwise at the next computed step."""
    module, plain = warm(tiny.build()), tiny.build()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        change(module)
        torch.manual_seed(5)
        change(plain)
    with served(module) as calls:
        output = tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert calls == [False]
    torch.testing.assert_close(output, tiny.step(plain, tiny.prompt(), 1.0, tiny.latents()), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_new_weights_are_used(assign):
    module, other = warm(tiny.build()), tiny.build(seed=7)
    module.load_state_dict(copy.deepcopy(other).state_dict(), assign=assign)
    module.requires_grad_(False)
    output = tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    torch.testing.assert_close(output, tiny.step(other, tiny.prompt(), 1.0, tiny.latents()), rtol=0, atol=0)


def test_another_dtype_of_the_weights_goes_to_dynamo():
    module = warm(tiny.build()).double()
    with served(module) as calls:
        output = tiny.step(module, tiny.prompt().double(), 1.0, tiny.latents().double())
    assert calls == [False]
    expected = tiny.step(tiny.build().double(), tiny.prompt().double(), 1.0, tiny.latents().double())
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_one_tensor_for_two_inputs_goes_to_dynamo():
    class Same(tiny.Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.proj_text = nn.Linear(4, tiny.WIDTH)

    module = tiny.frozen(Same())
    enabled(module)
    latents, times = tiny.latents(), torch.full((tiny.BATCH,), 1.0)
    for _ in range(2):
        module(hidden_states=latents, encoder_hidden_states=tiny.latents(seed=2), timestep=times)
    with served(module) as calls:
        module(hidden_states=latents, encoder_hidden_states=latents, timestep=times)
    assert calls == [False]


def test_a_forward_hook_runs():
    module, hook_calls = warm(tiny.build()), []
    handle = module.register_forward_hook(lambda *_: hook_calls.append(1))
    tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    handle.remove()
    assert hook_calls == [1]


def test_a_wrong_argument_raises_the_error_of_the_forward():
    module = warm(tiny.build())
    with pytest.raises(TypeError, match="forward"):
        module(tiny.latents(), tiny.prompt(), torch.ones(2), colour="red")


# Graphs that Dynamo no longer uses are not used either.


def test_after_a_reset_calls_go_to_dynamo_again():
    module = warm(tiny.build())
    torch._dynamo.reset()
    with served(module) as calls:
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert calls == [False]


def test_calls_go_to_dynamo_under_the_force_eager_stance():
    module = warm(tiny.build())
    with served(module) as calls, torch.compiler.set_stance("force_eager"):
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert calls == [False]


def test_two_modules_of_a_class_use_their_own_weights():
    one, other = warm(tiny.build()), warm(tiny.build(seed=7))
    for module, seed in ((one, 0), (other, 7)):
        with served(module) as calls:
            output = tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
        assert calls == [True]
        expected = tiny.step(tiny.build(seed=seed), tiny.prompt(), 1.0, tiny.latents())
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_attributes_that_a_forward_writes_are_updated():
    class Counting(tiny.Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.calls = torch.zeros(())

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            self.calls = self.calls + 1
            return super().forward(*args, **kwargs)

    module = enabled(tiny.frozen(Counting()))
    for _ in range(4):
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert module.calls == 4


def test_a_step_that_raises_leaves_no_state_behind():
    module, prompt = warm(tiny.build()), tiny.prompt()
    tiny.step(module, prompt, 1.0, tiny.latents())
    tiny.Watch.ran, tiny.Watch.error, tiny.Watch.error_at = 0, RuntimeError("out of memory"), 1
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.step(module, prompt, 0.9, tiny.latents())
    tiny.Watch.error = None
    assert last(module).num_steps == 1


def test_the_module_is_not_kept_alive():
    import gc
    import weakref

    module = warm(tiny.build())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
