"""Models that ComfyUI calls: every conditioning of a batch has its own session, whatever the batch was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations import comfyui
from tests import comfyui_simulation as simulation
from tests.comfyui_reference import REUSED, by_hand, model_of, prompts, steps_of
from tests.comfyui_simulation import Batches, Conditioning, ModelPatcher, apart, build, one_batch, sample
from tests.sessions import every_session


def config(**fields: Any) -> CacheConfig:
    base = dict(residual_diff_threshold=10.0, max_warmup_steps=2, max_continuous_cached_steps=2, forecaster=None)
    return CacheConfig(**base | dict(Fn_compute_blocks=1, inner_backend="eager") | fields)


def cached(patcher: ModelPatcher | None = None, **fields: Any) -> ModelPatcher:
    return comfyui.enable_cache(patcher or build(), config(**fields))


def flipped(step: int, found: list[int]) -> list[list[int]]:
    return [found[::-1] if step // 2 % 2 else found]


def sometimes_apart(step: int, found: list[int]) -> list[list[int]]:
    return apart(step, found) if step % 3 == 2 else one_batch(step, found)


@pytest.mark.parametrize("batches", [apart, one_batch, flipped, sometimes_apart], ids=lambda batches: batches.__name__)
def test_a_batch_is_reused_like_separate_calls(batches: Batches):
    patcher, conditionings = cached(), prompts()
    output = sample(patcher, conditionings, batches=batches)
    assert steps_of(patcher) == [(8, REUSED)] * 2
    assert torch.equal(output, by_hand(conditionings))


def test_computed_steps_are_those_of_separate_uncached_calls():
    patcher, conditionings = cached(max_warmup_steps=8), prompts()
    output = sample(patcher, conditionings)
    assert steps_of(patcher) == [(8, [])] * 2
    assert torch.equal(output, sample(build(), conditionings, batches=apart))


def test_several_latents_per_conditioning_stay_together():
    patcher, conditionings = cached(), prompts()
    output = sample(patcher, conditionings, batches=flipped, batch_size=3)
    assert steps_of(patcher) == [(8, REUSED)] * 2
    assert torch.equal(output, by_hand(conditionings, batch_size=3))


def test_regional_prompts_and_equal_prompts_have_their_own_sessions():
    """ComfyUI copies a regional conditioning, with its uuid, from the positive to the negative ones."""
    first = Conditioning(1, 0)
    conditionings = [first, Conditioning(3, 0), Conditioning(1, 1, uuid=first.uuid)]
    patcher = cached()
    output = sample(patcher, conditionings, batches=sometimes_apart)
    assert steps_of(patcher) == [(8, REUSED)] * 3
    assert torch.equal(output, by_hand(conditionings))


def test_conditionings_of_different_lengths():
    patcher, conditionings = cached(), [Conditioning(1, 0), Conditioning(2, 1, length=9)]
    output = sample(patcher, conditionings, batches=apart)
    assert steps_of(patcher) == [(8, REUSED)] * 2
    assert torch.equal(output, by_hand(conditionings))


def test_controls_and_lists_of_latents_are_split_with_the_batch():
    conditionings = prompts(
        control={"input": [torch.full((1, 2, simulation.DIM), 0.1 * i) for i in range(3)]},
        ref_latents=[torch.ones(1, simulation.CHANNELS, simulation.SIDE, simulation.SIDE)],
    )
    conditionings[1].extra["control"] = {"input": [-one for one in conditionings[0].extra["control"]["input"]]}
    patcher = cached()
    output = sample(patcher, conditionings, batches=flipped)
    assert steps_of(patcher) == [(8, REUSED)] * 2
    assert torch.equal(output, by_hand(conditionings))


def test_every_run_of_a_sampler_is_a_generation():
    """Also with the same conditionings, whose uuids are the same if the guider is."""
    patcher, conditionings = cached(), prompts()
    sample(patcher, conditionings)
    output = sample(patcher, conditionings, seed=6)
    assert steps_of(patcher) == [(8, REUSED)] * 4
    assert torch.equal(output, by_hand(conditionings, seed=6))


def test_an_interrupted_run_leaves_nothing_to_the_next():
    patcher, conditionings = cached(), prompts()

    def interrupt(step: int) -> None:
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(patcher, conditionings, on_step=interrupt)
    assert sum(stats.state_bytes for stats in every_session(model_of(patcher))) == 0
    assert torch.equal(sample(patcher, conditionings, seed=6), by_hand(conditionings, seed=6))


def test_a_prompt_that_changes_under_its_uuid_begins_a_new_generation():
    patcher, conditionings = cached(), prompts()

    def change(step: int) -> None:
        if step == 4:
            conditionings[0].context = conditionings[0].context + 1

    sample(patcher, conditionings, on_step=change)
    began = [(stats.began, stats.num_steps) for stats in every_session(model_of(patcher))]
    assert began == [("new", 8), ("new", 4), ("conditioning-changed", 4)]


def test_a_model_called_outside_of_a_sampler_is_told_apart_by_its_uuids_and_timesteps():
    patcher, (cond, uncond) = cached(), prompts()
    options = patcher.model_options["transformer_options"]
    x = torch.randn(2, simulation.CHANNELS, simulation.SIDE, simulation.SIDE)
    given = {name: torch.cat([cond.for_batch(1)[name], uncond.for_batch(1)[name]]) for name in ("c_crossattn", "y")}
    named = options | dict(cond_or_uncond=[0, 1], uuids=[cond.uuid, uncond.uuid])
    with torch.no_grad():
        for sigma in (*simulation.SIGMAS[:4], *simulation.SIGMAS[:4]):
            patcher.model.apply_model(x, sigma.repeat(2), **given, transformer_options=named)
    assert steps_of(patcher) == [(4, [2, 3])] * 4


@pytest.mark.parametrize("options", [{"cond_or_uncond": [0, 1]}, {"cond_or_uncond": [0, 1], "uuids": ["a"]}, {}])
def test_a_batch_whose_samples_are_not_named_is_one_call(options: dict[str, Any]):
    patcher, (cond, uncond) = cached(), prompts()
    options = patcher.model_options["transformer_options"] | options
    x = torch.randn(2, simulation.CHANNELS, simulation.SIDE, simulation.SIDE)
    given = {name: torch.cat([cond.for_batch(1)[name], uncond.for_batch(1)[name]]) for name in ("c_crossattn", "y")}
    with torch.no_grad():
        output = patcher.model.apply_model(x, torch.ones(2), **given, transformer_options=options)
        expected = build().model.apply_model(x, torch.ones(2), **given)
    assert [(stats.num_steps, stats.session.split()[0]) for stats in every_session(model_of(patcher))] == [
        (1, "conditioning")
    ]
    assert torch.equal(output, expected)


def test_only_the_clone_is_cached():
    original, conditionings = build(), prompts()
    before = dict(model_of(original).__dict__)
    patcher = cached(original)
    expected = sample(build(), conditionings)
    assert torch.equal(sample(original, conditionings), expected)
    assert every_session(model_of(original)) == []
    sample(patcher, conditionings)
    assert torch.equal(sample(original, conditionings), expected)
    assert len(every_session(model_of(original))) == 2
    assert model_of(original).__dict__ == before


def test_two_clones_have_their_own_configurations():
    original, conditionings = build(), prompts()
    first, second = cached(original), cached(original, max_warmup_steps=6)
    for patcher in (first, second, first):
        sample(patcher, conditionings)
    assert steps_of(first) == [(8, REUSED)] * 2 + [(8, [6, 7])] * 2 + [(8, REUSED)] * 2


def test_a_second_enable_cache_replaces_the_first():
    patcher = cached(cached(), max_warmup_steps=6)
    sample(patcher, prompts())
    assert steps_of(patcher) == [(8, [6, 7])] * 2


def test_the_names_of_the_sessions_say_which_conditioning_they_are_of():
    patcher, (cond, uncond) = cached(), prompts()
    sample(patcher, [cond, uncond])
    run = every_session(model_of(patcher))[0].session.split(",")[0]
    assert {stats.session for stats in every_session(model_of(patcher))} == {
        f"{run}, cond {cond.uuid}",
        f"{run}, uncond {uncond.uuid}",
    }


def test_a_transformer_is_refused_with_the_function_to_call_instead():
    with pytest.raises(ConfigError, match=r"must be a ModelPatcher of ComfyUI.*got DiffusionModel"):
        comfyui.enable_cache(model_of(build()))


def test_an_unknown_field_is_refused_when_the_cache_is_enabled():
    with pytest.raises(ConfigError, match="residual_diff_treshold"):
        comfyui.enable_cache(build(), residual_diff_treshold=0.1)


def test_a_compiled_diffusion_model_is_refused():
    patcher = build()
    patcher.model.diffusion_model = torch.compile(patcher.model.diffusion_model)
    with pytest.raises(ConfigError, match="the diffusion model is compiled already"):
        cached(patcher)


def test_summary_counts_the_calls(capsys: pytest.CaptureFixture[str]):
    patcher = cached()
    sample(patcher, prompts())
    cachedit_fx.summary(model_of(patcher), logging=True)
    assert "16 calls since the cache was enabled: 8 computed, 8 reused" in capsys.readouterr().out
