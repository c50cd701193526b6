"""After `enable_cache` a transformer is still a module that can be called, moved, saved, loaded and copied."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx.errors import ConfigError
from cachedit_fx.runtime.cached_call import MAX_POLICIES
from cachedit_fx.runtime.instances import instances_in
from tests import tiny
from tests.sessions import every_session
from tests.tiny import TIMES, build, config, fields, generate, latents, prompt
from tests.tiny_pipelines import PIPELINES

WAN = PIPELINES["wan"]
NUM_STEPS = 6
EAGER = dict(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=1.0, forecaster=None)
EAGER |= dict(inner_backend="eager")
REASONS = ["warmup"] * 3 + ["threshold-one"] * 3


def enabled(**others: Any) -> nn.Module:
    return cachedit_fx.enable_cache(build(), config(**others), fullgraph=True)


def expected(seed: int, times: tuple[float, ...] = TIMES, **others: Any) -> list[Tensor]:
    """The outputs of a generation that runs alone, from the plain-Python reference."""
    return [record.output for record in tiny.reference(build(), prompt(seed), latents(seed), times, **others).records]


def steps_of(model: nn.Module) -> list[int]:
    return [stats.num_steps for stats in every_session(model)]


# A bare transformer in a plain loop.


def test_a_bare_transformer_starts_a_new_session_for_every_generation():
    model, texts = enabled(), [prompt(1), prompt(2)]
    for seed in (1, 1, 2, 1):  # Each prompt is one object.
        tiny.assert_bitwise(generate(model, texts[seed - 1], latents(seed)), expected(seed))
    assert steps_of(model) == [8] * 4
    assert [stats.cached_steps for stats in every_session(model)] == [[1, 3, 5, 7]] * 4
    assert [stats.num_steps for stats in cachedit_fx.summary(model, logging=False)] == [8]


def test_a_session_ends_after_num_inference_steps():
    model, text = enabled(num_inference_steps=3), prompt(1)
    # The timestep always falls, so that only the number of steps separates the three generations.
    for times in (TIMES[:3], TIMES[3:6], TIMES[6:]):
        tiny.assert_bitwise(generate(model, text, latents(1), times), expected(1, times))
    assert steps_of(model) == [3, 3, 2]


def test_without_num_inference_steps_falling_timesteps_continue_the_session():
    model, text = enabled(), prompt(1)
    outputs = [output for times in (TIMES[:3], TIMES[3:]) for output in generate(model, text, latents(1), times)]
    tiny.assert_bitwise(outputs, expected(1))
    assert steps_of(model) == [8]


# Refreshing.


def test_a_refresh_starts_a_new_session_and_compiles_nothing():
    model, text = enabled(), prompt(1)
    generate(model, text, latents(1), TIMES[:3])
    counters.clear()
    cachedit_fx.refresh_context(model)
    assert [len(instance._sessions) for instance in instances_in(model)] == [0]
    tiny.assert_bitwise(generate(model, text, latents(1), TIMES[3:]), expected(1, TIMES[3:]))
    assert steps_of(model) == [3, 5]
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"residual_diff_threshold": 0.2},
        {"max_warmup_steps": 4},
        {"max_cached_steps": 2},
        {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2},
    ],
    ids=str,
)
def test_a_refreshed_limit_takes_effect_and_compiles_nothing(change):
    model, text = enabled(), prompt(1)
    tiny.assert_bitwise(generate(model, text, latents(1)), expected(1))
    counters.clear()
    cachedit_fx.refresh_context(model, cachedit_fx.CacheConfig(**change), verbose=True)
    tiny.assert_bitwise(generate(model, text, latents(1)), expected(1, **change))
    cachedit_fx.refresh_context(model, **fields(max_cached_steps=-1, max_continuous_cached_steps=-1))
    tiny.assert_bitwise(generate(model, text, latents(1)), expected(1))
    assert counters["stats"]["unique_graphs"] == 0


def test_a_refreshed_number_of_steps_takes_effect_and_compiles_nothing():
    model, text = enabled(), prompt(1)
    generate(model, text, latents(1))
    counters.clear()
    cachedit_fx.refresh_context(model, num_inference_steps=4)
    for times in (TIMES[:4], TIMES[4:]):
        tiny.assert_bitwise(generate(model, text, latents(1), times), expected(1, times))
    assert steps_of(model) == [8, 4, 4]
    assert counters["stats"]["unique_graphs"] == 0


def test_a_refresh_that_changes_the_cuts_recompiles():
    model, text = enabled(), prompt(1)
    generate(model, text, latents(1))
    counters.clear()
    cachedit_fx.refresh_context(model, Fn_compute_blocks=2)
    tiny.assert_bitwise(generate(model, text, latents(1)), expected(1, Fn_compute_blocks=2))
    assert counters["stats"]["unique_graphs"] == 1
    assert [stats.region for stats in every_session(model)] == ["blocks[1:4]", "blocks[2:4]"]


def test_a_refresh_of_a_pipeline_reaches_all_of_its_transformers():
    models = build(), build()
    pipe = SimpleNamespace(components=dict(transformer=models[0], transformer_2=models[1]))
    cachedit_fx.enable_cache(pipe, config())
    cachedit_fx.refresh_context(pipe, max_warmup_steps=4)
    cachedit_fx.refresh_context(models[1], max_warmup_steps=6)  # In addition, for one of them.
    for model, cached in zip(models, ([4, 6], [6]), strict=True):
        generate(model, prompt(1), latents(1))
        assert every_session(model)[-1].cached_steps == cached


def test_a_refresh_of_a_module_without_the_cache_is_refused():
    model = build()
    with pytest.raises(ConfigError, match="enable_cache was not called for this Transformer"):
        cachedit_fx.refresh_context(model, max_warmup_steps=4)
    cachedit_fx.disable_cache(cachedit_fx.enable_cache(model, config()))
    with pytest.raises(ConfigError, match="enable_cache was not called for this Transformer"):
        cachedit_fx.refresh_context(model)


# Use as a module.


def test_disabling_restores_a_transformer_that_was_compiled_in_place():
    model = build()
    model.compile(backend="eager")
    before = model._compiled_call_impl
    cachedit_fx.enable_cache(model, config())
    tiny.assert_bitwise(generate(model, prompt(1), latents(1)), expected(1))
    cachedit_fx.disable_cache(model)
    assert model._compiled_call_impl is before
    tiny.assert_bitwise(generate(model, prompt(1), latents(1)), generate(build(), prompt(1), latents(1)))


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(lambda model: model, id="bare"),
        pytest.param(lambda model: SimpleNamespace(transformer=model), id="in-a-pipeline"),
    ],
)
def test_a_module_returned_by_torch_compile_is_refused(around):
    with pytest.raises(ConfigError, match=r"compiled already; pass the module that torch\.compile was given"):
        cachedit_fx.enable_cache(around(torch.compile(build())), config())


def cached_pipe() -> tuple[DiffusionPipeline, Tensor]:
    """Wan's pipeline with the cache enabled, and the output of one run."""
    pipe = cachedit_fx.enable_cache(WAN.build(2), **EAGER)
    return pipe, WAN.run(pipe, num_steps=NUM_STEPS)


def assert_cached(pipe: DiffusionPipeline) -> None:
    """Asserts that the last call reused all steps that it could."""
    assert [stats.decisions for stats in cachedit_fx.summary(pipe, logging=False)] == [REASONS] * 2


def scale(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def scaled_pipe(factor: float) -> DiffusionPipeline:
    """A plain pipeline with other weights."""
    pipe = WAN.build(2)
    scale(pipe.transformer, factor)
    return pipe


def test_another_dtype_is_cached_and_computed_steps_are_bitwise_equal():
    flux = PIPELINES["flux"]
    plain, pipe = flux.build(2), cachedit_fx.enable_cache(flux.build(2), **EAGER)
    flux.run(pipe, num_steps=NUM_STEPS)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = {k: v.to(dtype) for k, v in flux.arguments().items() if isinstance(v, Tensor)}
        plain.to(dtype)
        pipe.to(dtype)
        cachedit_fx.refresh_context(pipe, residual_diff_threshold=0.0)
        output = flux.run(pipe, num_steps=NUM_STEPS, **inputs)
        assert output.dtype == dtype
        tiny.assert_bitwise([output], [flux.run(plain, num_steps=NUM_STEPS, **inputs)])
        cachedit_fx.refresh_context(pipe, residual_diff_threshold=1.0)
        flux.run(pipe, num_steps=NUM_STEPS, **inputs)
        assert [stats.decisions for stats in cachedit_fx.summary(pipe, logging=False)] == [REASONS]


def test_a_saved_pipeline_holds_the_plain_model(tmp_path):
    pipe, output = cached_pipe()
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path).eval()
    saved = pipe.transformer.state_dict()
    assert loaded.state_dict().keys() == saved.keys() == WAN.build(2).transformer.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    assert not {"_compiled_call_impl", "forward", "_diffusers_hook"} & {*vars(loaded)}
    tiny.assert_bitwise([WAN.run(pipe, num_steps=NUM_STEPS)], [output])
    assert_cached(pipe)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loaded_weights_are_used_at_the_next_call_without_a_new_graph(assign):
    pipe, output = cached_pipe()
    other = cachedit_fx.enable_cache(scaled_pipe(0.9), **EAGER)
    wanted = WAN.run(other, num_steps=NUM_STEPS)
    counters.clear()
    pipe.transformer.load_state_dict(copy.deepcopy(other.transformer.state_dict()), assign=assign)
    pipe.transformer.requires_grad_(False)  # Assigned weights have their own `requires_grad`.
    tiny.assert_bitwise([WAN.run(pipe, num_steps=NUM_STEPS)], [wanted])
    assert not torch.equal(wanted, output)
    assert_cached(pipe)
    assert counters["stats"]["unique_graphs"] == 0


def test_another_pipeline_with_the_same_components_is_cached():
    pipe, output = cached_pipe()
    counters.clear()
    other = type(pipe).from_pipe(pipe)
    assert other is not pipe and other.transformer is pipe.transformer
    tiny.assert_bitwise([WAN.run(other, num_steps=NUM_STEPS)], [output])
    assert_cached(other)
    assert counters["stats"]["unique_graphs"] == 0
    cachedit_fx.disable_cache(other)
    tiny.assert_bitwise([WAN.run(pipe, num_steps=NUM_STEPS)], [WAN.run(WAN.build(2), num_steps=NUM_STEPS)])


def test_a_deep_copy_runs_its_own_weights():
    pipe, output = cached_pipe()
    copied = copy.deepcopy(pipe.transformer)
    scale(copied, 0.9)
    other = scaled_pipe(1.0)
    other.transformer = copied
    tiny.assert_bitwise([WAN.run(other, num_steps=3)], [WAN.run(scaled_pipe(0.9), num_steps=3)])
    tiny.assert_bitwise([WAN.run(pipe, num_steps=NUM_STEPS)], [output])
    assert_cached(pipe)


def test_a_transformer_can_be_pickled():
    pipe, output = cached_pipe()
    loaded = pickle.loads(pickle.dumps(pipe.transformer))
    other = WAN.build(2)
    other.transformer = loaded
    tiny.assert_bitwise([WAN.run(other, num_steps=3)], [WAN.run(WAN.build(2), num_steps=3)])
    tiny.assert_bitwise([WAN.run(pipe, num_steps=NUM_STEPS)], [output])
    assert_cached(pipe)


def test_a_guard_filter_reaches_dynamo_and_inductor_gets_the_other_options():
    asked = []

    def keep_all(entries):
        asked.extend(entry.name for entry in entries)
        return [True] * len(entries)

    model = build()
    cachedit_fx.enable_cache(model, config(residual_diff_threshold=1.0), options={"guard_filter_fn": keep_all})
    generate(model, prompt(), latents())
    assert asked
    assert cachedit_fx.summary(model, logging=False)[0].cached_steps
    cachedit_fx.enable_cache(
        model, config(residual_diff_threshold=1.0), options={"guard_filter_fn": keep_all}
    )  # The same settings: nothing is compiled.
    asked.clear()
    generate(model, prompt(), latents())
    assert not asked


def test_policies_that_only_finished_requests_used_are_released():
    class Decider:
        def decide(self, _step: object) -> None:
            return None

    module, deciders = enabled(), []
    for number in range(MAX_POLICIES + 8):
        decider = Decider()
        deciders.append(weakref.ref(decider))
        cachedit_fx.refresh_context(module, decider=decider)
        with torch.no_grad():
            tiny.step(module, tiny.prompt(), 1.0 - number / 100, tiny.latents())
        del decider
    cachedit_fx.refresh_context(module, decider=None)
    gc.collect()
    assert sum(decider() is not None for decider in deciders) <= MAX_POLICIES


def test_a_model_whose_class_was_defined_by_exec_is_cached():
    names: dict[str, Any] = {"__name__": "module_without_a_file", "Transformer": tiny.Transformer}
    exec("class Typed(Transformer):\n    pass", names)
    model = tiny.frozen(names["Typed"]())
    cachedit_fx.enable_cache(model, **tiny.fields(inner_backend="eager"))
    tiny.generate(model, tiny.prompt(), tiny.latents())
    assert cachedit_fx.is_cached(model)
