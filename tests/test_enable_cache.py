"""`enable_cache` and `disable_cache` on every pipeline, and the arguments that they accept and refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import BlockAdapter
from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor, HunyuanImagePatchFunctor
from cachedit_fx.config.cache_config import OPTION_NAMES
from cachedit_fx.errors import ConfigError
from cachedit_fx.frontend.enabled import enabled_of
from cachedit_fx.runtime.instances import instances_in
from tests import tiny as tiny_model
from tests.sessions import every_session
from tests.tiny_pipelines import PIPELINES, TinyPipeline
from tests.traces import traces_of

NUM_BLOCKS = 2  # Blocks per list.
NUM_STEPS = 8  # Four steps per transformer of Wan 2.2, and four steps of FLUX's image-to-image.
WARMUP_STEPS = 3
FIELDS = dict(Fn_compute_blocks=1, max_warmup_steps=WARMUP_STEPS, residual_diff_threshold=0.0, forecaster=None)
FIELDS |= dict(inner_backend="eager")
BROKEN_UP = ("lumina2", "zimage")  # Dynamo cannot capture their forward as one graph. Fast dispatch may not serve it.
UNCACHED = {"hidream": "HiDreamPatchFunctor", "hunyuan_image": "HunyuanImagePatchFunctor"}  # The missing functors.


def names(pipelines: list[TinyPipeline]) -> Any:
    return pytest.mark.parametrize("tiny", pipelines, ids=[tiny.name for tiny in pipelines])


each_cached = names([tiny for tiny in PIPELINES.values() if tiny.name not in UNCACHED])
an_uncached = names([PIPELINES["hidream"]])


def traces(pipe: DiffusionPipeline) -> dict[str, object]:
    return traces_of(pipe.components)


def transformers(tiny: TinyPipeline, pipe: DiffusionPipeline) -> list[nn.Module]:
    return [getattr(pipe, name) for name in tiny.transformers]


def assert_equal(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("cachedit_fx") and r.levelno >= logging.WARNING]


# Every pipeline.


@each_cached
def test_only_reused_steps_differ_and_disabling_leaves_no_trace(tiny):
    pipe = tiny.build(NUM_BLOCKS)
    plain = tiny.run(pipe, num_steps=NUM_STEPS)
    before = traces(pipe)

    assert cachedit_fx.enable_cache(pipe, **FIELDS) is pipe
    assert_equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)
    for module in transformers(tiny, pipe):
        assert {reason for stats in every_session(module) for reason in stats.decisions} == {"warmup", "threshold-zero"}

    cachedit_fx.refresh_context(pipe, residual_diff_threshold=1.0)
    assert not torch.equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)
    if tiny.name not in BROKEN_UP:
        assert {enabled_of(module).fast_dispatch.reason for module in transformers(tiny, pipe)} == {""}
    last = cachedit_fx.summary(pipe, logging=False)
    assert {stats.module for stats in last} == {*tiny.transformers}
    for stats in last:
        assert stats.num_steps > WARMUP_STEPS
        rest = stats.num_steps - WARMUP_STEPS
        assert stats.decisions == ["warmup"] * WARMUP_STEPS + ["threshold-one"] * rest
        assert stats.peak_state_bytes > 0
    if tiny.guidance_branches:
        assert [stats.session for stats in last] == [*tiny.guidance_branches] * len(tiny.transformers)
    for module in transformers(tiny, pipe):
        if hasattr(module, "cache_context"):  # diffusers then notifies it at the end of a call of the pipeline.
            assert [len(instance._sessions) for instance in instances_in(module)] == [0]
            assert {stats.state_bytes for stats in every_session(module)} == {0}

    cachedit_fx.disable_cache(pipe)
    assert traces(pipe) == before
    assert_equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)
    assert traces(pipe) == before
    assert cachedit_fx.summary(pipe, logging=False) == last


@pytest.mark.parametrize(
    ("tiny", "functor"),
    [(PIPELINES["hidream"], HiDreamPatchFunctor), (PIPELINES["hunyuan_image"], HunyuanImagePatchFunctor)],
    ids=lambda value: getattr(value, "name", None),
)
def test_with_their_functor_only_reused_steps_differ_and_disabling_leaves_no_trace(tiny, functor):
    pipe = tiny.build(NUM_BLOCKS)
    plain = tiny.run(pipe, num_steps=NUM_STEPS)
    before = traces(pipe)
    cachedit_fx.enable_cache(BlockAdapter(pipe=pipe, patch_functor=functor()), fullgraph=True, **FIELDS)
    # The functors change how the models compute some values, which changes the rounding on some processors.
    torch.testing.assert_close(tiny.run(pipe, num_steps=NUM_STEPS), plain, rtol=0, atol=5e-6)
    cachedit_fx.refresh_context(pipe, residual_diff_threshold=1.0)
    assert not torch.equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)
    for stats in cachedit_fx.summary(pipe, logging=False):
        assert stats.cached_steps == [*range(WARMUP_STEPS, NUM_STEPS)]
    cachedit_fx.disable_cache(pipe)
    assert traces(pipe) == before
    assert_equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)


@an_uncached
def test_a_pipeline_that_needs_a_functor_runs_uncached_and_warns(tiny, caplog):
    pipe = tiny.build(NUM_BLOCKS)
    plain = tiny.run(pipe, num_steps=NUM_STEPS)
    before = traces(pipe)
    cachedit_fx.enable_cache(pipe, **FIELDS | {"residual_diff_threshold": 1.0})
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        assert_equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)
    assert not cachedit_fx.is_cached(pipe.transformer)
    assert cachedit_fx.summary(pipe, logging=False) == []
    (warning,) = warnings_in(caplog)
    mended = f"{UNCACHED[tiny.name]}, which makes it one graph: enable_cache(BlockAdapter(..., patch_functor="
    for words in (
        "runs without caching",
        "Dynamo captured",
        "graphs instead of one",
        mended,
        'options={"on_no_match": "raise"}',
    ):
        assert words in warning
    cachedit_fx.disable_cache(pipe)
    assert traces(pipe) == before
    assert_equal(tiny.run(pipe, num_steps=NUM_STEPS), plain)


@names([PIPELINES["wan22"], PIPELINES["sd3"]])  # One with hooks and one without.
def test_a_pipeline_that_never_ran_is_left_without_a_trace(tiny):
    pipe = tiny.build(NUM_BLOCKS)
    before = traces(pipe)
    for _ in range(2):
        cachedit_fx.enable_cache(pipe, **FIELDS)
        cachedit_fx.disable_cache(pipe)
        cachedit_fx.disable_cache(pipe)
    assert traces(pipe) == before


class Doubles(ModelHook):
    """A hook of other code."""

    def post_forward(self, module, output):
        return (2 * output[0],)


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_hooks_of_other_code_keep_working_after_enabling_and_disabling(is_first):
    tiny = PIPELINES["cogvideox"]
    plain, pipe = tiny.build(NUM_BLOCKS), tiny.build(NUM_BLOCKS)
    HookRegistry.check_if_exists_or_initialize(plain.transformer).register_hook(Doubles(), "doubles")
    expected = tiny.run(plain, num_steps=4)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    if is_first:
        registry.register_hook(Doubles(), "doubles")
    cachedit_fx.enable_cache(pipe, **FIELDS)
    if not is_first:
        registry.register_hook(Doubles(), "doubles")
    assert_equal(tiny.run(pipe, num_steps=4), expected)
    assert cachedit_fx.is_cached(pipe.transformer)
    cachedit_fx.disable_cache(pipe)
    assert_equal(tiny.run(pipe, num_steps=4), expected)  # A hook of the package inside of it remains idle.
    registry.remove_hook("doubles")
    assert not torch.equal(tiny.run(pipe, num_steps=4), expected)


# Enabling again, with the same settings and with others.


def test_enabling_the_same_settings_again_changes_and_compiles_nothing():
    tiny = PIPELINES["wan"]
    pipe = tiny.build(NUM_BLOCKS)
    cachedit_fx.enable_cache(pipe, **FIELDS, fullgraph=True)
    first, enabled = tiny.run(pipe, num_steps=4), traces(pipe)
    counters.clear()
    cachedit_fx.enable_cache(pipe, **FIELDS, fullgraph=True)
    assert traces(pipe) == enabled
    assert_equal(tiny.run(pipe, num_steps=4), first)
    cachedit_fx.disable_cache(pipe)
    cachedit_fx.enable_cache(pipe, **FIELDS, fullgraph=True)  # Disabling and enabling again needs no new graph.
    assert_equal(tiny.run(pipe, num_steps=4), first)
    assert counters["stats"]["unique_graphs"] == 0


def test_enabling_other_settings_replaces_the_earlier_ones():
    model, text, noise = tiny_model.build(), tiny_model.prompt(), tiny_model.latents()
    before = dict(vars(model))
    for fields, cached in (
        ({}, [1, 3, 5, 7]),
        ({"max_warmup_steps": 4}, [4, 6]),
        ({"residual_diff_threshold": 1.0}, [1, 2, 3, 4, 5, 6, 7]),
        ({"Bn_compute_blocks": 2}, [1, 3, 5, 7]),
    ):
        cachedit_fx.enable_cache(model, tiny_model.config(**fields))
        outputs = tiny_model.generate(model, text, noise)
        assert every_session(model)[-1].cached_steps == cached
        expected = tiny_model.reference(tiny_model.build(), text, noise, **fields)
        tiny_model.assert_bitwise(outputs, [record.output for record in expected.records])
    cachedit_fx.disable_cache(model)
    assert vars(model) == before


def test_one_process_can_use_any_number_of_configurations():
    """By default Dynamo stores at most eight compilations of a forward, for all modules together."""
    model = tiny_model.build()
    for number in range(10):
        cachedit_fx.reset()
        cachedit_fx.enable_cache(model, tiny_model.config(residual_diff_threshold=1.0 + number))
        tiny_model.generate(model, tiny_model.prompt(), tiny_model.latents())
        assert [stats.cached_steps for stats in every_session(model)] == [[1, 2, 3, 4, 5, 6, 7]], number


# Arguments of torch.compile.


def test_fullgraph_makes_a_graph_break_an_error():
    model = tiny_model.frozen(tiny_model.TwoLists(broken=True))
    cachedit_fx.enable_cache(model, tiny_model.config(), fullgraph=True)
    with pytest.raises(Unsupported, match="graph_break"):
        tiny_model.step(model, tiny_model.prompt(), 1.0, tiny_model.latents())


@pytest.mark.parametrize(("dynamic", "num_graphs"), [(True, 1), (False, 3)])
def test_dynamic_decides_whether_one_graph_serves_all_sizes(dynamic, num_graphs):
    model = cachedit_fx.enable_cache(tiny_model.build(), tiny_model.config(), dynamic=dynamic, fullgraph=True)
    counters.clear()
    for tokens in (6, 7, 9):
        noise, text = tiny_model.latents(tokens=tokens), tiny_model.prompt()
        outputs = tiny_model.generate(model, text, noise)
        assert every_session(model)[-1].cached_steps == [1, 3, 5, 7]
        expected = tiny_model.reference(tiny_model.build(), text, noise)
        tiny_model.assert_bitwise(outputs, [record.output for record in expected.records])
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_mode_and_options_are_passed_to_inductor(monkeypatch):
    received = []

    class Spy:
        config: dict[str, Any] = {}  # noqa: RUF012 As the real one's.

        def __init__(self, mode: str | None, options: dict[str, Any], dynamic: bool | None) -> None:
            received.append((mode, options))

        def __call__(self, gm: Any, example_inputs: Any) -> Any:
            return gm.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Spy)
    fields = dict(Fn_compute_blocks=1, mode="max-autotune-no-cudagraphs", options={"epilogue_fusion": False})
    model = cachedit_fx.enable_cache(tiny_model.build(), **fields)
    tiny_model.step(model, tiny_model.prompt(), 1.0, tiny_model.latents())
    assert received == [("max-autotune-no-cudagraphs", {"epilogue_fusion": False})]
    assert cachedit_fx.is_cached(model)


@pytest.mark.slow
def test_a_model_compiled_with_an_option_of_inductor_is_cached():
    fields = tiny_model.fields(options={"epilogue_fusion": False}, fullgraph=True)
    model = cachedit_fx.enable_cache(tiny_model.build(), **fields)
    outputs = tiny_model.generate(model, tiny_model.prompt(), tiny_model.latents())
    assert every_session(model)[-1].cached_steps == [1, 3, 5, 7]
    expected = tiny_model.reference(tiny_model.build(), tiny_model.prompt(), tiny_model.latents())
    for output, record in zip(outputs, expected.records, strict=True):
        # Fused float32 kernels round differently; the outputs are about 1.
        torch.testing.assert_close(output, record.output, rtol=0, atol=1e-5)


# Refused arguments.


def refusal(target: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cachedit_fx.enable_cache(target, *args, **kwargs)
    message = str(caught.value)
    assert message.startswith("cachedit_fx: ")
    return message


def test_an_unknown_argument_is_named_with_those_that_are_allowed():
    model = tiny_model.build()
    before = dict(vars(model))
    message = refusal(model, residual_threshold=0.1)
    assert "'residual_threshold'" in message
    for name in ("fullgraph", "dynamic", "mode", "options", *OPTION_NAMES):
        assert name in message
    assert vars(model) == before


def test_a_pipeline_without_a_transformer_is_refused_with_a_list_of_its_components():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    message = refusal(DDPMPipeline(unet, DDPMScheduler()))
    for words in ("DDPMPipeline", "unet (UNet2DModel)", "scheduler (DDPMScheduler)", "a diffusion transformer"):
        assert words in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"calibrator_config": object()}, "calibrator_config must be a Forecaster", id="calibrator"),
        pytest.param({"cache_config": {"Fn_compute_blocks": 1}}, "cache_config must be a CacheConfig", id="a-dict"),
        pytest.param({"Fn_compute_blocks": -1}, "Fn_compute_blocks must be an int >= 0, got -1", id="a-value"),
        pytest.param(
            {"inner_backend": "eager", "options": {"epilogue_fusion": False}}, "'epilogue_fusion'", id="no-inductor"
        ),
    ],
)
def test_a_refused_call_changes_no_component_of_a_pipeline(arguments, words):
    pipe = PIPELINES["wan22"].build(NUM_BLOCKS)
    before = traces(pipe)
    assert words in refusal(pipe, **arguments)
    assert traces(pipe) == before
