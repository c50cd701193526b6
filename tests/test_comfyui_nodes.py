"""ComfyUI's nodes "Compile with cache" and "Cache report": limits by the steps of a sampler, and what they show."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations import comfyui
from cachedit_fx.integrations.comfyui.compile_nodes import CacheReport, CompileWithCache
from cachedit_fx.integrations.comfyui.model_cache import cache_of
from cachedit_fx.policies import StepView
from tests.comfyui_reference import by_hand, model_of, prompts, steps_of
from tests.comfyui_simulation import SIGMAS, ModelPatcher, ModelSampling, Solver, build, one_batch, sample

pytestmark = pytest.mark.shares_graphs("comfyui nodes")
NODES = comfyui.NODE_CLASS_MAPPINGS
FIVE = torch.linspace(1, 0, 6)
NINE = torch.linspace(1, 0, 10)


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    """The model without a cache, whose graphs the tests share."""
    return build()


def compiled(base: ModelPatcher, mode: str = "threshold", **inputs: Any) -> ModelPatcher:
    """What the node returns; by default, every step is reused that may be."""
    given = dict(residual_diff_threshold=1.0, warmup_steps=0, forecaster="none", start_percent=0.0, end_percent=1.0)
    (patcher,) = CompileWithCache().compile(base, mode, **given | dict(backend="eager") | inputs)
    return patcher


def reused_of(patcher: ModelPatcher) -> list[list[int]]:
    return [reused for _, reused in steps_of(patcher)]


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_a_node_has_what_comfyui_reads(node: Any):
    inputs = node.INPUT_TYPES()
    names = [name for group in inputs.values() for name in group]
    assert names == [*inspect.signature(getattr(node(), node.FUNCTION)).parameters]
    assert {*inputs} <= {"required", "optional"} and node.CATEGORY and node.DESCRIPTION
    for kind, *widget in (found for group in inputs.values() for found in group.values()):
        choices = kind if isinstance(kind, list) else None
        assert choices or kind in ("MODEL", "LATENT", "FLOAT", "INT", "BOOLEAN")
        assert choices is None or widget[0]["default"] in choices
    assert {*node.RETURN_TYPES} <= {"MODEL", "LATENT", "IMAGE", "STRING"}
    assert NODES.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()


def test_the_defaults_of_the_node_are_those_of_the_package(base: ModelPatcher):
    inputs = [found for group in CompileWithCache.INPUT_TYPES().values() for found in group.items()]
    defaults = {name: widget[1]["default"] for name, widget in inputs if len(widget) > 1}
    (patcher,) = CompileWithCache().compile(base, **defaults)
    cache = cache_of(patcher)
    assert cache is not None and cache.enabled(model_of(base)).settings.config == CacheConfig(max_warmup_steps=8)


def test_the_folder_is_a_custom_node_that_imports_nothing_of_comfyui():
    folder = Path(comfyui.__file__).parent
    spec = importlib.util.spec_from_file_location("custom_nodes.cachedit", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == NODES
    assert not any(name == "nodes" or name.partition(".")[0] == "comfy" for name in sys.modules)


def test_the_node_of_the_documentation_caches_a_model(base: ModelPatcher):
    page = (Path(__file__).parents[1] / "docs" / "comfyui.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    node = names["CacheModel"]()
    (patcher,) = getattr(node, node.FUNCTION)(base, node.INPUT_TYPES()["required"]["threshold"][1]["default"])
    cache = cache_of(patcher)
    assert cache is not None and cache.enabled(model_of(base)).settings.config == CacheConfig()


@pytest.mark.parametrize("name", CompileWithCache.INPUT_TYPES()["required"]["forecaster"][0])
def test_every_forecaster_of_the_list_is_accepted(base: ModelPatcher, name: str):
    assert compiled(base, forecaster=name) is not base


def test_steps_outside_of_the_percentages_are_computed(base: ModelPatcher):
    patcher, conditionings = compiled(base, start_percent=0.25, end_percent=0.75), prompts()
    output = sample(patcher, conditionings, batches=one_batch)
    assert reused_of(patcher) == [[2, 3, 4, 5]] * 2  # Sigmas above 0.25, up to 0.75: 0.75, 0.625, 0.5, 0.375.
    assert torch.equal(output, by_hand(conditionings, [2, 3, 4, 5], patcher=base))


def test_the_percentages_follow_the_patched_noise_schedule(base: ModelPatcher):
    patcher, conditionings = compiled(base, start_percent=0.25, end_percent=0.75), prompts()
    patcher.add_object_patch("model_sampling", ModelSampling(shift=3.0))  # 0.25 -> sigma 0.9, 0.75 -> 0.5.
    sample(patcher, conditionings)
    patcher.unload()
    assert reused_of(patcher) == [[1, 2, 3]] * 2


def test_a_solver_that_calls_the_model_twice_per_step_is_limited_by_its_noise_levels(base: ModelPatcher):
    patcher, conditionings = compiled(base, start_percent=0.25, end_percent=0.75), prompts()
    output = sample(patcher, conditionings, solver=Solver(midpoint=True))
    reused = [*range(4, 12)]  # Of 16 calls, those at sigmas from 0.75 to 0.3125.
    assert reused_of(patcher) == [reused] * 2
    assert torch.equal(output, by_hand(conditionings, reused, patcher=base, solver=Solver(midpoint=True)))


def test_the_mask_fits_the_number_of_steps_of_each_sampler(base: ModelPatcher):
    """Two samplers in one workflow. The masks are those of `steps_mask`."""
    patcher, conditionings = compiled(base, "mask: medium"), prompts()
    first = sample(patcher, conditionings)
    second = sample(patcher, conditionings, sigmas=NINE)
    assert reused_of(patcher) == [[4, 6], [4, 6], [5, 7], [5, 7]]
    assert torch.equal(first, by_hand(conditionings, [4, 6], patcher=base, num_fn_blocks=0))
    assert torch.equal(second, by_hand(conditionings, [5, 7], patcher=base, num_fn_blocks=0, sigmas=NINE))


def test_the_mask_counts_steps_of_the_sampler_and_not_calls_of_the_model(base: ModelPatcher):
    patcher = compiled(base, "mask: medium")
    sample(patcher, prompts(), solver=Solver(midpoint=True))
    assert reused_of(patcher) == [[8, 9, 12, 13]] * 2  # The steps 4 and 6.


def test_a_mask_and_percentages_hold_together(base: ModelPatcher):
    patcher = compiled(base, "mask: medium", end_percent=0.6)
    sample(patcher, prompts())
    assert reused_of(patcher) == [[4]] * 2


def test_a_number_of_steps_without_a_mask_computes_every_step_and_warns_once_per_run(
    base: ModelPatcher, caplog: pytest.LogCaptureFixture
):
    patcher = compiled(base, "mask: slow")
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        sample(patcher, prompts(), sigmas=FIVE)
    assert reused_of(patcher) == [[]] * 2
    assert [record.message.splitlines()[0] for record in caplog.records] == [
        "cachedit_fx: a run of a sampler has 5 steps, for which there is no mask, so that every step of it is computed."
    ]


def test_a_sampler_that_adds_noise_computes_every_step_of_a_mask(base: ModelPatcher):
    patcher = compiled(base, "mask: medium")
    sample(patcher, prompts(), sigmas=SIGMAS.flip(0))
    assert reused_of(patcher) == [[]] * 2


def test_a_call_whose_step_is_not_known_is_computed(base: ModelPatcher):
    """The masked model is called by another node, without a sampler."""
    patcher, (cond, _) = compiled(base, "mask: medium"), prompts()
    options = patcher.model_options["transformer_options"] | dict(cond_or_uncond=[0], uuids=[cond.uuid])
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        for sigma in SIGMAS[:8]:
            patcher.model.apply_model(x, sigma[None], **cond.for_batch(1), transformer_options=options)
    assert steps_of(patcher) == [(8, [])]


def test_the_last_steps_of_a_sampler_are_computed(base: ModelPatcher):
    patcher = comfyui.enable_cache(
        base, residual_diff_threshold=1.0, max_warmup_steps=0, forecaster=None, inner_backend="eager"
    )
    limited = comfyui.enable_cache(
        patcher, final_compute_steps=3, residual_diff_threshold=1.0, max_warmup_steps=4, inner_backend="eager"
    )
    sample(limited, prompts())
    assert [reused[-1] for reused in reused_of(limited)] == [4, 4]


def test_a_decider_decides_between_the_percentages(base: ModelPatcher):
    class Odd:
        def decide(self, step: StepView) -> bool:
            return step.number % 2 == 0

    config = CacheConfig(decider=Odd(), start_percent=0.25, end_percent=0.75, inner_backend="eager", forecaster=None)
    patcher = comfyui.enable_cache(base, config)
    sample(patcher, prompts())
    assert reused_of(patcher) == [[3, 5]] * 2


def test_an_unknown_mask_policy_is_refused_when_the_cache_is_enabled(base: ModelPatcher):
    with pytest.raises(ConfigError, match="mask_policy must be one of slow, medium, fast, ultra, got 'fats'"):
        comfyui.enable_cache(base, mask_policy="fats")


def test_a_cancelled_run_leaves_nothing_to_the_next(base: ModelPatcher):
    patcher, conditionings = compiled(base, "mask: medium"), prompts()

    def cancel(step: int) -> None:
        if step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(patcher, conditionings, on_step=cancel)
    output = sample(patcher, conditionings, seed=6, sigmas=NINE)
    assert torch.equal(output, by_hand(conditionings, [5, 7], patcher=base, num_fn_blocks=0, seed=6, sigmas=NINE))


def test_a_model_with_a_lora_and_the_unloaded_model_are_reused_from_their_own_weights(base: ModelPatcher):
    """The adapter is added behind the node, and the model is loaded and unloaded between the runs."""
    patcher, conditionings = compiled(base, start_percent=0.25), prompts()
    adapted, plain = patcher.clone(), base.clone()
    for one in (adapted, plain):
        one.add_patches({"diffusion_model.double_blocks.2.proj.weight": torch.full((16, 16), 0.3)})
    reused = range(2, 8)
    for cached, uncached in ((patcher, base), (adapted, plain), (patcher, base)):
        output = sample(cached, conditionings)
        cached.unload()
        assert torch.equal(output, by_hand(conditionings, reused, patcher=uncached))
        uncached.unload()
    assert reused_of(patcher) == [[*reused]] * 6
    assert not torch.equal(sample(adapted, conditionings), sample(patcher, conditionings))


def test_a_wrapper_of_another_node_around_the_model_function_is_called(base: ModelPatcher):
    patcher, conditionings, seen = compiled(base, start_percent=0.25), prompts(), []

    def wrapper(apply_model: Any, given: dict[str, Any]) -> Tensor:
        seen.append(given["cond_or_uncond"])
        return apply_model(given["input"], given["timestep"], **given["c"])

    patcher.set_model_unet_function_wrapper(wrapper)
    output = sample(patcher, conditionings)
    assert seen == [[1, 0]] * 8
    assert torch.equal(output, by_hand(conditionings, range(2, 8), patcher=base))


def test_off_returns_the_model_and_compile_only_reuses_nothing(base: ModelPatcher):
    assert compiled(base, "off") is base
    patcher, conditionings = compiled(base, "compile only"), prompts()
    output = sample(patcher, conditionings)
    assert reused_of(patcher) == [[]] * 2
    assert torch.equal(output, by_hand(conditionings, [], patcher=base))


def test_another_threshold_compiles_nothing(base: ModelPatcher):
    sample(compiled(base), prompts())
    before = counters["stats"]["unique_graphs"]
    sample(compiled(base, residual_diff_threshold=0.3, start_percent=0.1), prompts())
    sample(compiled(base, "compile only"), prompts())
    assert counters["stats"]["unique_graphs"] == before


def colors_of(image: Tensor) -> dict[str, bool]:
    """Which kinds of steps a picture shows."""
    colors = {"computed": (0x1F, 0x66, 0xB8), "reused": (0xF0, 0xA0, 0x60)}
    pixels = (image * 255).round()
    return {name: bool((pixels == torch.tensor(color)).all(-1).any()) for name, color in colors.items()}


def test_the_report_shows_the_runs_of_its_own_model(base: ModelPatcher):
    patcher, other, latent = compiled(base), compiled(base, "compile only"), {"samples": torch.zeros(1)}
    sample(patcher, prompts())
    sample(other, prompts())
    returned, image, text = CacheReport().report(patcher.clone(), latent)
    assert returned is latent and (image.dtype, image.ndim, image.shape[3]) == (torch.float32, 4, 3)
    assert image.min() >= 0 and image.max() == 1
    assert colors_of(image) == {"computed": True, "reused": True}
    assert text.count("| reuse ") == 14 and "32 calls since the cache was enabled: 18 computed, 14 reused" in text
    _, image, text = CacheReport().report(other, latent)
    assert colors_of(image) == {"computed": True, "reused": False} and "threshold-zero" in text


def test_the_report_shows_the_last_run_or_every_run(base: ModelPatcher):
    patcher, report = compiled(base, "mask: medium"), CacheReport()
    sample(patcher, prompts())
    sample(patcher, prompts(), sigmas=NINE)
    _, last, of_last = report.report(patcher, {})
    _, every, of_every = report.report(patcher, {}, every_run=True)
    assert (of_last.count("| decider-reuse"), of_every.count("| decider-reuse")) == (4, 8)
    assert every.shape[1] > 1.5 * last.shape[1]


def test_the_report_of_a_model_without_a_cache_says_so(base: ModelPatcher):
    _, image, text = CacheReport().report(base, {})
    assert text == "No cache is enabled for this model."
    assert image.shape[0] == 1 and image.min() < 0.5  # The same text.


def test_the_report_of_a_model_that_no_sampler_has_called_says_so(base: ModelPatcher):
    patcher = compiled(base)
    _, image, text = CacheReport().report(patcher, {})
    assert text.startswith("DiffusionModel: no call has been seen since the cache was enabled.")
    assert image.shape[0] == 1 and image.min() < 0.5  # The same text.
