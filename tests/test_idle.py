"""A model that runs without the cache says so: every call is counted, and the reason is told when it begins."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

import cachedit_fx
from cachedit_fx import CallCounts, NoMatchError
from cachedit_fx.entry_points import entry_points
from cachedit_fx.idle import why_none_reused
from cachedit_fx.stats import CacheStats
from tests import tiny
from tests.sessions import every_session
from tests.tiny import TIMES, build, config, frozen, generate, latents, prompt, step
from tests.tiny_pipelines import PIPELINES

CPU = torch.device("cpu")
CALLS = len(TIMES)
ALL_REUSED = dict(residual_diff_threshold=1.0)


def enabled(model: Any = None, **others: Any) -> Any:
    return cachedit_fx.enable_cache(build() if model is None else model, config(**others))


def run(model: Any, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return generate(model, prompt(seed), latents(seed))


def counts(model: Any) -> CallCounts:
    """Of the one module that the cache is enabled for."""
    (found,) = cachedit_fx.summary(model, logging=False).calls.values()
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The warnings of the package since this was called last."""

    def read() -> list[str]:
        records = [r for r in caplog.records if r.name.startswith("cachedit_fx") and r.levelno >= logging.WARNING]
        caplog.clear()
        return [record.getMessage() for record in records]

    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        yield read


# Calls are counted.


@pytest.mark.parametrize("is_fast", [True, False], ids=["light", "dynamo"])
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
    assert "No call has been seen yet." in (tmp_path / "run.html").read_text(encoding="utf-8")


# Uncached.


def test_an_uncached_model_is_counted_and_shown_in_place_of_sessions(tmp_path, said):
    model = enabled(Fn_compute_blocks=4)
    run(model)
    (warning,) = said()
    assert "this graph of Transformer runs without caching" in warning
    found = counts(model)
    assert (found.uncached, found.total) == (CALLS, CALLS)
    ((reason, count),) = found.reasons.items()
    assert reason.startswith("too-few-blocks: expected Fn_compute_blocks + Bn_compute_blocks < 4") and count == CALLS
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
    """Reads the mode, as all models do in which it makes a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self.dropout(hidden_states), encoder_hidden_states, timestep)


@LATER
def test_what_begins_later_is_told_when_it_does_and_once(change, why, said):
    model = enabled(frozen(Dropping()))
    run(model)
    assert said() == [] and cachedit_fx.is_cached(model)
    change(model)
    for _ in range(2):
        generate(model, prompt(), latents())
    (warning,) = said()
    assert "runs without caching" in warning and why in warning
    assert not cachedit_fx.is_cached(model)
    assert (counts(model).computed, counts(model).reused, counts(model).uncached) == (4, 4, 2 * CALLS)
    model.eval().requires_grad_(False)
    run(model)
    assert cachedit_fx.is_cached(model)


@LATER
def test_what_begins_later_raises_if_asked_to(change, why):
    model = enabled(frozen(Dropping()), on_no_match="raise")
    run(model)
    change(model)
    with pytest.raises(NoMatchError, match=why):
        generate(model, prompt(), latents())


def test_an_empty_batch_is_counted_and_told_of_once(said):
    model = enabled()
    run(model)
    with torch.no_grad():
        for timestep in TIMES[:2]:
            step(model, prompt(batch=0), timestep, latents(batch=0))
    (warning,) = said()
    assert "empty" in warning and counts(model).uncached == 2
    run(model, seed=2)
    assert counts(model).reused == 8 and said() == []


def test_a_second_model_of_the_class_is_told_of_too(said):
    for model in (build(), build(1)):
        run(enabled(model, Fn_compute_blocks=4))
        assert len(said()) == 1


def test_dynamo_that_is_turned_off_is_told(said):
    model = enabled()
    with torch.compiler.set_stance("force_eager"):
        run(model)
    (warning,) = said()
    assert "Dynamo ran no graph of it" in warning and "torch.compiler.set_stance" in warning
    assert counts(model).uncached == CALLS and not cachedit_fx.is_cached(model)


# Hooks of accelerate and diffusers.


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def dispatch(model: nn.Module) -> None:
    places = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, device_map=places, main_device="cpu", force_hooks=True)


def cast(model: nn.Module) -> None:
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


HOOKS = pytest.mark.parametrize(
    ("add_hooks", "hook"),
    [(offload, "AlignDevicesHook"), (dispatch, "AlignDevicesHook"), (cast, "layerwise_casting")],
    ids=["cpu_offload", "dispatch_model", "casting"],
)


@HOOKS
@pytest.mark.parametrize("when", ["before", "after a run"])
def test_hooks_that_keep_dynamo_out_are_named(add_hooks, hook, when, said):
    model = build()
    if when == "before":
        add_hooks(model)
    enabled(model)
    if when == "after a run":
        run(model)
        assert cachedit_fx.is_cached(model)
        cachedit_fx.reset(model)
        add_hooks(model)
    for _ in range(2):
        run(model)
    (warning,) = said()
    assert "Transformer runs without caching" in warning and f"{hook} around its layers" in warning
    assert not cachedit_fx.is_cached(model)
    assert counts(model).uncached == 2 * CALLS
    assert all(hook in reason for reason in counts(model).reasons)


@HOOKS
def test_hooks_that_keep_dynamo_out_raise_if_asked_to(add_hooks, hook):
    model = enabled(on_no_match="raise")
    add_hooks(model)
    with pytest.raises(NoMatchError, match=hook):
        run(model)


# Other methods of the model.


class Guided(tiny.Transformer):
    """Samplers call `forward_with_cfg`, or `decode`, which runs the blocks without the forward."""

    def forward_with_cfg(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        half = hidden_states[: len(hidden_states) // 2]
        return self.forward(torch.cat((half, half)), encoder_hidden_states, timestep)

    def decode(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        hidden_states, text = self.proj_in(hidden_states), self.proj_text(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, text = block(hidden_states, text, scale)
        return (self.proj_out(hidden_states),)

    def by_call(self, hidden_states: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        return (self(hidden_states, **others)[0], self.blocks[0].image.weight)

    def num_weights(self, of: Tensor) -> int:
        return sum(of.numel() for _ in self.blocks)


METHODS = pytest.mark.parametrize("method", ["forward_with_cfg", "decode"])


def called(model: Any, method: str) -> list[Tensor]:
    with torch.no_grad():
        return generate(getattr(model, method), prompt(), latents())


@METHODS
def test_a_method_that_passes_the_cache_by_is_told_once_and_counted(method, said):
    model = enabled(frozen(Guided()))
    for _ in range(2):
        outputs = called(model, method)
    (warning,) = said()
    assert f"Guided.{method} runs without caching" in warning and f'enable_cache(model, method="{method}")' in warning
    assert (counts(model).unseen, counts(model).total) == (2 * CALLS, 2 * CALLS)
    cachedit_fx.disable_cache(model)
    assert method not in vars(model)
    tiny.assert_bitwise(called(model, method), outputs)


@METHODS
def test_a_method_that_passes_the_cache_by_raises_if_asked_to(method):
    model = enabled(frozen(Guided()), on_no_match="raise")
    with pytest.raises(NoMatchError, match=f"Guided.{method} runs without caching"):
        called(model, method)


def test_methods_that_do_not_run_the_blocks_past_the_cache_are_left_in_peace(said):
    model = enabled(frozen(Guided()))
    called(model, "by_call")
    assert model.num_weights(torch.ones(2)) == 8
    assert said() == []
    assert counts(model) == CallCounts(computed=4, reused=4)


def test_entry_points_are_methods_that_the_forward_does_not_reach():
    class Split(tiny.Transformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.features(*args, **kwargs)

        def features(self, *args: Any, **kwargs: Any) -> Any:
            return tiny.Transformer.forward(self, *args, **kwargs)

    assert entry_points(build()) == entry_points(Split()) == []
    assert entry_points(Guided()) == ["forward_with_cfg", "decode", "by_call", "num_weights"]


@METHODS
def test_a_method_is_cached_by_its_name(method, said):
    plain, model = frozen(Guided()), frozen(Guided())
    model.load_state_dict(plain.state_dict())
    before = dict(vars(model))
    cachedit_fx.enable_cache(model, config(residual_diff_threshold=0.0), method=method)
    tiny.assert_bitwise(called(model, method), called(plain, method))
    cachedit_fx.enable_cache(model, config(), method=method)
    called(model, method)
    assert every_session(model)[-1].cached_steps == [1, 3, 5, 7]
    assert cachedit_fx.is_cached(model) and said() == []
    assert counts(model) == CallCounts(computed=CALLS + 4, reused=4)
    cachedit_fx.disable_cache(model)
    assert vars(model) == before


def test_the_forward_can_be_cached_as_a_method_for_samplers_that_call_it():
    model = cachedit_fx.enable_cache(build(), config(), method="forward")
    with torch.no_grad():
        outputs = generate(model.forward, prompt(), latents())
    expected = tiny.reference(build(), prompt(), latents())
    tiny.assert_bitwise(outputs, [record.output for record in expected.records])
    assert counts(model) == CallCounts(computed=4, reused=4)


# A cache of diffusers.


@pytest.mark.parametrize("on_no_match", ["fallback", "raise"])
def test_a_cache_of_diffusers_that_is_enabled_afterwards_is_told(on_no_match, said):
    flux, steps = PIPELINES["flux"], 4
    pipe = cachedit_fx.enable_cache(flux.build(2), config(on_no_match=on_no_match))
    flux.run(pipe, num_steps=steps)
    other = flux.build(2)
    for one in (pipe, other):
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if on_no_match == "raise":
        with pytest.raises(NoMatchError, match="a cache of diffusers is enabled for it as well"):
            flux.run(pipe, num_steps=steps)
        return
    output = flux.run(pipe, num_steps=steps)
    (warning,) = said()
    assert "a cache of diffusers is enabled for it as well" in warning
    tiny.assert_bitwise([output], [flux.run(other, num_steps=steps)])
    assert counts(pipe).uncached == steps and not cachedit_fx.is_cached(pipe.transformer)
    pipe.transformer.disable_cache()
    flux.run(pipe, num_steps=steps)
    assert cachedit_fx.is_cached(pipe.transformer)


# Copies.


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIES = pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])


@COPIES
def test_a_copy_is_enabled_with_the_same_settings_and_shares_nothing(make_copy, said):
    model = enabled()
    run(model)
    copied = make_copy(model)
    assert counts(copied) == CallCounts() and not cachedit_fx.is_cached(copied)
    expected = tiny.reference(build(), prompt(2), latents(2))
    tiny.assert_bitwise(run(copied, seed=2), [record.output for record in expected.records])
    assert counts(copied) == counts(model) == CallCounts(computed=4, reused=4)
    cachedit_fx.refresh_context(copied, **ALL_REUSED)
    run(copied)
    assert counts(copied) == CallCounts(computed=5, reused=11)
    run(model)
    assert counts(model) == CallCounts(computed=8, reused=8)
    cachedit_fx.disable_cache(copied)
    assert vars(copied).keys() == vars(build()).keys()
    assert cachedit_fx.is_cached(model) and not cachedit_fx.is_cached(copied)
    assert said() == []


@COPIES
def test_a_copy_of_a_module_with_hooks_of_diffusers_is_disabled_without_a_trace(make_copy):
    flux = PIPELINES["flux"]
    pipe, other = flux.build(2), flux.build(2)
    keys = {*vars(pipe.transformer)}
    cachedit_fx.enable_cache(pipe, **tiny.fields(**ALL_REUSED, inner_backend="eager"))
    other.transformer = make_copy(pipe.transformer)
    tiny.assert_bitwise([flux.run(other, num_steps=4)], [flux.run(pipe, num_steps=4)])
    (stats,) = cachedit_fx.summary(other, logging=False)
    assert (stats.session, stats.cached_steps, stats.state_bytes) == ("cond", [1, 2, 3], 0)
    cachedit_fx.disable_cache(other)
    assert {*vars(other.transformer)} == keys


@COPIES
def test_a_copy_of_a_cached_method_is_cached(make_copy):
    model = cachedit_fx.enable_cache(frozen(Guided()), config(), method="decode")
    copied = make_copy(model)
    called(copied, "decode")
    assert counts(copied) == CallCounts(computed=4, reused=4)
    assert counts(model) == CallCounts()


class Locked:
    """A decider that can neither be copied nor pickled."""

    def __init__(self) -> None:
        self.made = (number for number in range(3))

    def decide(self, _step: object) -> None:
        return None


@COPIES
@pytest.mark.parametrize("method", [None, "decode"])
def test_a_copy_without_its_settings_runs_plain_and_is_told_of(make_copy, method, said):
    model = cachedit_fx.enable_cache(frozen(Guided()), config(decider=Locked()), method=method)
    copied = make_copy(model)
    (warning,) = said()
    assert "a copy of this Guided has no cache" in warning and "call enable_cache for the copy" in warning
    tiny.assert_bitwise(called(copied, "decode"), called(model if method is None else copied, "decode"))
    assert not cachedit_fx.is_cached(copied) and cachedit_fx.summary(copied, logging=False).calls == {}
    enabled(copied)
    run(copied)
    assert counts(copied) == CallCounts(computed=4, reused=4)


# `is_cached`.


def test_is_cached_forgets_what_was_compiled_before():
    model = build()
    run(tiny.compiled(model))
    assert cachedit_fx.is_cached(model)
    enabled(model, Fn_compute_blocks=4)
    run(model)
    assert not cachedit_fx.is_cached(model)
    enabled(model)
    run(model)
    assert cachedit_fx.is_cached(model)


def test_is_cached_ends_with_the_cache():
    model = enabled()
    run(model)
    cachedit_fx.disable_cache(model)
    assert not cachedit_fx.is_cached(model)


def compiled_again(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("displace", [compiled_again, copy.copy])
def test_a_cache_that_something_else_took_the_place_of_is_told(displace):
    model = enabled()
    run(model)
    other = displace(model)
    run(other)
    assert not cachedit_fx.is_cached(other)
    (note,) = cachedit_fx.summary(other, logging=False).notes
    assert "its calls run without the cache; call enable_cache again" in note
    enabled(other)
    run(other, seed=2)
    assert cachedit_fx.is_cached(other) and cachedit_fx.summary(other, logging=False).notes == []
    cachedit_fx.disable_cache(other)
    assert cachedit_fx.is_cached(model) == (model is not other)


def test_a_pipeline_made_of_the_parts_of_another_counts_with_it():
    flux = PIPELINES["flux"]
    pipe = cachedit_fx.enable_cache(flux.build(2), config(**ALL_REUSED))
    other = type(pipe).from_pipe(pipe)
    flux.run(other, num_steps=4)
    assert counts(pipe) == counts(other) == CallCounts(computed=1, reused=3)
    copied = copy.deepcopy(pipe)
    flux.run(copied, num_steps=4)
    assert counts(copied) == CallCounts(computed=1, reused=3) == counts(pipe)


# Why nothing was reused.


def stepping(model: Any, times: Any = TIMES, make_prompt: Callable[[int], Tensor] | None = None) -> None:
    text = prompt()
    with torch.no_grad():
        for number, timestep in enumerate(times):
            step(model, make_prompt(number) if make_prompt is not None else text, timestep, latents())


@pytest.mark.parametrize(
    ("fields", "how", "line"),
    [
        pytest.param(
            dict(residual_diff_threshold=0.04),
            {},
            "0 of 8 steps were reused: no diff was below the threshold of 0.04; the smallest was 0.05, at step 1",
            id="diff",
        ),
        pytest.param(
            dict(max_warmup_steps=8),
            {},
            "0 of 8 steps were reused: all of them are warm-up steps (max_warmup_steps); 8 steps are too few",
            id="few-steps",
        ),
        pytest.param({}, dict(times=[0.5]), "0 of 1 steps were reused: the first step of a session", id="one-step"),
        pytest.param(
            {},
            dict(times=[0.5] * 4),
            "0 of 4 steps were reused: each of 4 sessions had a single step",
            id="a-shared-prompt",
        ),
        pytest.param(dict(residual_diff_threshold=0.0), {}, "residual_diff_threshold is 0 or less", id="threshold"),
        pytest.param(dict(max_cached_steps=0), {}, "max_cached_steps allows no reused step", id="limit"),
        pytest.param(
            dict(decision_rule="budget", residual_diff_threshold=0.01),
            {},
            "no sum of diffs was below the threshold of 0.01; the smallest was 0.05",
            id="budget",
        ),
    ],
)
def test_a_summary_says_why_nothing_was_reused(fields, how, line):
    model = enabled(**fields)
    stepping(model, **how)
    found = cachedit_fx.summary(model, logging=False)
    (note,) = found.notes
    assert note.startswith("0 of ") and line in note
    assert note in str(found) and cachedit_fx.report(model).to_dict()["notes"] == [note]


def test_windows_that_cannot_be_told_apart_are_named():
    entry = CacheStats("blocks[1:]", "cond", 3, decisions=["warmup", "nan", "nan"])
    assert "windows or tiles share a prompt" in why_none_reused("", [entry])
    assert why_none_reused("transformer", [entry]) == ""


def test_a_summary_of_a_run_that_reused_says_nothing_of_the_kind():
    model = enabled()
    run(model)
    assert cachedit_fx.summary(model, logging=False).notes == []


# The bare backend.


class Layer(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).tanh()


class Broken(nn.Module):
    """Dynamo makes a graph of every layer, and none of the model."""

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


def test_the_bare_backend_warns_once_per_model(said, tmp_path):
    for model in (frozen(Broken()), frozen(tiny.TwoLists(broken=True))):
        run(bare(model))
        cachedit_fx.report(model, tmp_path / "run.html")
        assert "The model runs without the cache." in (tmp_path / "run.html").read_text(encoding="utf-8")
        (warning,) = said()
        assert f"this graph of {type(model).__name__} runs without caching" in warning
        assert f"{type(model).__name__} runs without the cache: " in str(cachedit_fx.summary(model, logging=False))


def test_the_bare_backend_warns_of_what_begins_later(said):
    model = frozen(Dropping())
    compiled = bare(model)
    run(compiled)
    assert said() == [] and cachedit_fx.is_cached(model)
    model.train()
    run(compiled)
    (warning,) = said()
    assert "this graph of Dropping runs without caching" in warning and "training" in warning
    assert not cachedit_fx.is_cached(model)


def test_the_bare_backend_raises_for_every_graph():
    with pytest.raises(BackendCompilerFailed) as caught:
        run(bare(frozen(Broken()), on_no_match="raise"))
    assert isinstance(caught.value.inner_exception, NoMatchError)
