"""A model that runs without the cache is reported: every call is counted, and the reason is logged once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

import cachedit_fx
from cachedit_fx import NoMatchError
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import ALL_REUSED, CALLS, counts, enabled, run, warnings_in
from tests.sessions import every_session
from tests.tiny import TIMES, build, config, frozen, generate, latents, prompt, step
from tests.tiny_pipelines import PIPELINES


@pytest.fixture
def logged_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: warnings_in(caplog)


# Calls are counted.


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast_dispatch", "dynamo"])
def test_computed_and_reused_calls_are_counted(is_fast):
    model = enabled(fast_dispatch=is_fast)
    run(model)
    assert counts(model) == CallCounts(computed=4, reused=4)
    run(model, seed=2)
    assert counts(model) == CallCounts(computed=8, reused=8)
    assert "16 calls since the cache was enabled: 8 computed, 8 reused" in str(
        cachedit_fx.summary(model, logging=False)
    )
    cachedit_fx.reset(model)
    assert counts(model) == CallCounts()


def test_calls_are_counted_since_the_cache_was_enabled():
    model = enabled()
    run(model)
    cachedit_fx.refresh_context(model, residual_diff_threshold=1.0)
    assert counts(model).total == CALLS
    cachedit_fx.disable_cache(model)
    assert counts(model).total == CALLS  # The statistics remain.
    enabled(model)
    assert counts(model) == CallCounts()


def test_a_call_that_reuses_one_of_its_regions_is_counted_once():
    model = enabled(frozen(tiny.TwoLists()), regions="per_list")
    run(model)
    assert counts(model).total == CALLS


def test_in_shadow_mode_every_call_is_computed():
    model = enabled(shadow=True)
    run(model)
    assert every_session(model)[0].cached_steps
    assert counts(model) == CallCounts(computed=CALLS)


def test_a_call_that_raises_is_not_counted():
    model = enabled()
    with pytest.raises(TorchRuntimeError, match="size"):
        step(model, prompt()[..., :2], 1.0, latents())
    assert counts(model) == CallCounts()


def test_a_pipeline_counts_the_calls_of_each_of_its_transformers():
    models = build(), build(1)
    pipe = SimpleNamespace(components=dict(transformer=models[0], transformer_2=models[1]))
    cachedit_fx.enable_cache(pipe, config())
    run(models[1])
    found = cachedit_fx.summary(pipe, logging=False)
    assert found.calls == {"transformer": CallCounts(), "transformer_2": CallCounts(computed=4, reused=4)}
    assert "transformer: no call has been seen since the cache was enabled" in str(found)


def test_a_model_that_was_not_called_is_reported_as_such(tmp_path):
    cachedit_fx.report(enabled(), tmp_path / "run.html")
    assert "The model has not been called yet." in (tmp_path / "run.html").read_text(encoding="utf-8")


# Uncached calls.


def test_an_uncached_model_is_counted_and_shown_in_place_of_sessions(tmp_path, logged_warnings):
    model = enabled(Fn_compute_blocks=4)
    run(model)
    (warning,) = logged_warnings()
    assert "this graph of Transformer runs without caching" in warning
    found = counts(model)
    assert (found.uncached, found.total) == (CALLS, CALLS)
    ((reason, count),) = found.reasons.items()
    assert reason.startswith("too-few-blocks: expected: Fn_compute_blocks + Bn_compute_blocks < 4") and count == CALLS
    report = cachedit_fx.report(model, tmp_path / "run.html")
    assert report.to_dict()["calls"][""]["uncached"] == CALLS
    for text in (str(report), report._repr_html_()):
        assert "too-few-blocks" in text and "no session has run yet" not in text
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "too-few-blocks" in page and f"All {CALLS} calls ran without the cache." in page
    assert "No session has run yet" not in page


def trained(model: nn.Module) -> None:
    model.train()


def with_gradients(model: nn.Module) -> None:
    model.requires_grad_(True)


LATER = pytest.mark.parametrize(("change", "why"), [(trained, "training"), (with_gradients, "gradients")])


class Dropping(tiny.Transformer):
    """A model with a dropout, whose graph depends on the training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self.dropout(hidden_states), encoder_hidden_states, timestep)


@LATER
def test_a_later_change_that_disables_the_cache_warns_once(change, why, logged_warnings):
    model = enabled(frozen(Dropping()))
    run(model)
    assert logged_warnings() == [] and cachedit_fx.is_cached(model)
    change(model)
    for _ in range(2):
        generate(model, prompt(), latents())
    (warning,) = logged_warnings()
    assert "runs without caching" in warning and why in warning
    assert not cachedit_fx.is_cached(model)
    assert (counts(model).computed, counts(model).reused, counts(model).uncached) == (4, 4, 2 * CALLS)
    model.eval().requires_grad_(False)
    run(model)
    assert cachedit_fx.is_cached(model)


@LATER
def test_a_later_change_that_disables_the_cache_raises_with_on_no_match_raise(change, why):
    model = enabled(frozen(Dropping()), on_no_match="raise")
    run(model)
    change(model)
    with pytest.raises(NoMatchError, match=why):
        generate(model, prompt(), latents())


def test_an_empty_batch_is_counted_and_warns_once(logged_warnings):
    model = enabled()
    run(model)
    with torch.no_grad():
        for timestep in TIMES[:2]:
            step(model, prompt(batch=0), timestep, latents(batch=0))
    (warning,) = logged_warnings()
    assert "empty" in warning and counts(model).uncached == 2
    run(model, seed=2)
    assert counts(model).reused == 8 and logged_warnings() == []


def test_a_second_model_of_the_class_warns_too(logged_warnings):
    for model in (build(), build(1)):
        run(enabled(model, Fn_compute_blocks=4))
        assert len(logged_warnings()) == 1


def test_a_disabled_dynamo_warns(logged_warnings):
    model = enabled()
    with torch.compiler.set_stance("force_eager"):
        run(model)
    (warning,) = logged_warnings()
    assert "Dynamo ran no graph of it" in warning and "torch.compiler.set_stance" in warning
    assert counts(model).uncached == CALLS and not cachedit_fx.is_cached(model)


# A cache of diffusers.


@pytest.mark.parametrize("on_no_match", ["fallback", "raise"])
def test_a_diffusers_cache_that_is_enabled_afterwards_is_reported(on_no_match, logged_warnings):
    flux, steps = PIPELINES["flux"], 4
    pipe = cachedit_fx.enable_cache(flux.build(2), config(on_no_match=on_no_match))
    flux.run(pipe, num_steps=steps)
    other = flux.build(2)
    for one in (pipe, other):
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if on_no_match == "raise":
        with pytest.raises(NoMatchError, match="a cache of diffusers is also enabled for it"):
            flux.run(pipe, num_steps=steps)
        return
    output = flux.run(pipe, num_steps=steps)
    (warning,) = logged_warnings()
    assert "a cache of diffusers is also enabled for it" in warning
    tiny.assert_bitwise([output], [flux.run(other, num_steps=steps)])
    assert counts(pipe).uncached == steps and not cachedit_fx.is_cached(pipe.transformer)
    pipe.transformer.disable_cache()
    flux.run(pipe, num_steps=steps)
    assert cachedit_fx.is_cached(pipe.transformer)


# `is_cached`.


def test_is_cached_ignores_earlier_compilations():
    model = build()
    run(tiny.compiled(model))
    assert cachedit_fx.is_cached(model)
    enabled(model, Fn_compute_blocks=4)
    run(model)
    assert not cachedit_fx.is_cached(model)
    enabled(model)
    run(model)
    assert cachedit_fx.is_cached(model)


def test_is_cached_is_false_after_disable_cache():
    model = enabled()
    run(model)
    cachedit_fx.disable_cache(model)
    assert not cachedit_fx.is_cached(model)


def compiled_again(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("displace", [compiled_again, copy.copy])
def test_a_replaced_compiled_forward_is_reported(displace):
    model = enabled()
    run(model)
    other = displace(model)
    run(other)
    assert not cachedit_fx.is_cached(other)
    (note,) = cachedit_fx.summary(other, logging=False).notes
    assert "its calls run without the cache, because the forward that enable_cache compiled was replaced" in note
    enabled(other)
    run(other, seed=2)
    assert cachedit_fx.is_cached(other) and cachedit_fx.summary(other, logging=False).notes == []
    cachedit_fx.disable_cache(other)
    assert cachedit_fx.is_cached(model) == (model is not other)


def test_pipelines_that_share_components_share_their_counts():
    flux = PIPELINES["flux"]
    pipe = cachedit_fx.enable_cache(flux.build(2), config(**ALL_REUSED))
    other = type(pipe).from_pipe(pipe)
    flux.run(other, num_steps=4)
    assert counts(pipe) == counts(other) == CallCounts(computed=1, reused=3)
    copied = copy.deepcopy(pipe)
    flux.run(copied, num_steps=4)
    assert counts(copied) == CallCounts(computed=1, reused=3) == counts(pipe)


# The bare backend.


class Layer(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).tanh()


class Broken(nn.Module):
    """A graph break after every layer: Dynamo captures one graph per layer, and no graph contains the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(4, 4) for _ in range(5))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            torch._dynamo.graph_break()
        return (hidden_states,)


def bare(model: nn.Module, **others: Any) -> Any:
    return torch.compile(model, backend=cachedit_fx.Backend(config(**others)))


def test_the_bare_backend_warns_once_per_model(logged_warnings, tmp_path):
    for model in (frozen(Broken()), frozen(tiny.TwoLists(broken=True))):
        run(bare(model))
        cachedit_fx.report(model, tmp_path / "run.html")
        assert "The model runs without the cache." in (tmp_path / "run.html").read_text(encoding="utf-8")
        (warning,) = logged_warnings()
        assert f"this graph of {type(model).__name__} runs without caching" in warning
        assert f"{type(model).__name__} runs without the cache: " in str(cachedit_fx.summary(model, logging=False))


def test_the_bare_backend_warns_when_the_model_enters_training_mode(logged_warnings):
    model = frozen(Dropping())
    compiled = bare(model)
    run(compiled)
    assert logged_warnings() == [] and cachedit_fx.is_cached(model)
    model.train()
    run(compiled)
    (warning,) = logged_warnings()
    assert "this graph of Dropping runs without caching" in warning and "training" in warning
    assert not cachedit_fx.is_cached(model)


def test_the_bare_backend_raises_for_every_graph():
    with pytest.raises(BackendCompilerFailed) as caught:
        run(bare(frozen(Broken()), on_no_match="raise"))
    assert isinstance(caught.value.inner_exception, NoMatchError)
