"""Configurations of diffusers' caches and of cache-dit, given to `enable_cache`, mean here what they mean there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook, TaylorSeerState

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import DMDCalibratorConfig, FoCaCalibratorConfig, TaylorSeerCalibratorConfig
from cachedit_fx.integrations.foreign_configs import as_cache_config
from tests.tiny_pipelines import PIPELINES

NUM_STEPS = 10
RATIOS = [1.0, 0.99, 0.98, 0.97, 0.99, 0.95, 0.98, 0.96, 0.9, 0.8]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def reused(pipe) -> list[list[int]]:
    return [entry.cached_steps for entry in cachedit_fx.summary(pipe, logging=False)]


def outputs_of_both(config: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """The latents of a FLUX pipeline with the cache of diffusers, and with this one; and the steps that it reused."""
    entry = PIPELINES["flux"]
    theirs, ours = entry.build(), entry.build()
    theirs.transformer.enable_cache(config)
    expected = entry.run(theirs, num_steps=NUM_STEPS)
    cachedit_fx.enable_cache(ours, config, inner_backend="eager")
    return expected, entry.run(ours, num_steps=NUM_STEPS), reused(ours)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
def test_first_block_cache_gives_the_same_latents_here(threshold):
    expected, found, steps = outputs_of_both(FirstBlockCacheConfig(threshold=threshold))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert threshold < 0.5 or steps != [[]]


@pytest.mark.parametrize(("threshold", "skips"), [(0.06, 3), (0.2, 2), (1.0, 3)])
def test_mag_cache_gives_the_same_latents_here(threshold, skips):
    config = MagCacheConfig(threshold, skips, num_inference_steps=NUM_STEPS, mag_ratios=RATIOS)
    expected, found, steps = outputs_of_both(config)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert steps != [[]]


@pytest.mark.parametrize(("interval", "before", "after"), [(5, 3, None), (2, 1, 8), (3, 0, None)])
def test_taylorseer_computes_the_steps_that_the_hook_of_diffusers_computes(interval, before, after):
    states = StateManager(TaylorSeerState)
    states.set_context(CacheContext(name="one"))
    hook = TaylorSeerCacheHook(interval, before, torch.float32, states, after)
    computed = [bool(hook._measure_should_compute()[0]) for _ in range(NUM_STEPS)]

    entry = PIPELINES["flux"]
    pipe = entry.build()
    config = TaylorSeerCacheConfig(interval, before, after, max_order=2)
    cachedit_fx.enable_cache(pipe, config, inner_backend="eager")
    entry.run(pipe, num_steps=NUM_STEPS)
    expected = [i for i, computes in enumerate(computed) if not computes and i > 0]  # Nothing is cached at step 0.
    assert reused(pipe) == [expected]
    assert as_cache_config(config).forecaster == TaylorSeerCalibratorConfig(taylorseer_order=2)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (FirstBlockCacheConfig(threshold=1.5), r"FirstBlockCacheConfig\.threshold must be below 1, got 1\.5"),
        (MagCacheConfig(calibrate=True), r"MagCacheConfig\.calibrate must be False, got True"),
        (
            TaylorSeerCacheConfig(use_lite_mode=True),
            r"TaylorSeerCacheConfig\.use_lite_mode must be left at its default",
        ),
        (TaylorSeerCacheConfig(cache_identifiers=["a"]), r"TaylorSeerCacheConfig\.cache_identifiers must be left"),
        (
            PyramidAttentionBroadcastConfig(),
            r"got a PyramidAttentionBroadcastConfig\.\nIt reuses parts inside of the blocks",
        ),
        (SeaCacheConfig(), r"got a SeaCacheConfig\.\nIt compares filtered latents"),
        (
            dict(threshold=0.1),
            "cache_config must be a CacheConfig, or a dict of one for each of transformer, got {'threshold': 0.1}",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_field(config, told):
    with pytest.raises(ConfigError, match=told):
        cachedit_fx.enable_cache(PIPELINES["flux"].build(), config)


def of_cache_dit(name: str, **fields: Any) -> Any:
    """An object like one of cache-dit 1.5.3, which need not be installed: a dataclass of a module of that package."""
    defaults = dict(cache_type="DBCache", Fn_compute_blocks=8, Bn_compute_blocks=0, residual_diff_threshold=0.08)
    kind = dataclasses.make_dataclass(
        name, [(field, Any, dataclasses.field(default=value)) for field, value in {**defaults, **fields}.items()]
    )
    kind.__module__ = "cache_dit.caching.cache_contexts.cache_config"
    return kind


def test_an_object_of_cache_dit_is_read_by_its_attributes():
    config = of_cache_dit("DBCacheConfig", max_warmup_steps=8, steps_computation_mask=None)(
        Fn_compute_blocks=1, max_warmup_steps=2, steps_computation_mask=[1, 0, 0]
    )
    found = as_cache_config(config)
    assert type(found) is cachedit_fx.DBCacheConfig
    assert (found.Fn_compute_blocks, found.residual_diff_threshold, found.max_warmup_steps) == (1, 0.08, 2)
    assert found.steps_computation_mask == (1, 0, 0)
    assert found.given == {"Fn_compute_blocks", "max_warmup_steps", "steps_computation_mask"}


def test_pruning_of_cache_dit_is_recognized():
    kind = of_cache_dit("DBPruneConfig", enable_dynamic_prune_threshold=False)
    found = as_cache_config(kind(cache_type="DBPrune", enable_dynamic_prune_threshold=True))
    assert (type(found), found.cache_type) == (cachedit_fx.DBPruneConfig, "DBPrune")
    assert found.enable_dynamic_prune_threshold


def test_a_field_of_cache_dit_without_a_counterpart_is_named(caplog):
    kind = of_cache_dit("DBPruneConfig", enable_dynamic_prune_threshold=False, force_reduce_calibrator_vram=False)
    as_cache_config(kind(force_reduce_calibrator_vram=True))
    assert "DBPruneConfig.force_reduce_calibrator_vram=True is ignored" in caplog.text


def test_a_calibrator_of_cache_dit_becomes_a_forecaster():
    kind = dataclasses.make_dataclass(
        "TaylorSeerCalibratorConfig",
        [
            ("enable_calibrator", bool, dataclasses.field(default=True)),
            ("enable_encoder_calibrator", bool, dataclasses.field(default=True)),
            ("calibrator_type", str, dataclasses.field(default="taylorseer")),
            ("calibrator_cache_type", str, dataclasses.field(default="residual")),
            ("calibrator_kwargs", dict, dataclasses.field(default_factory=dict)),
            ("taylorseer_order", int, dataclasses.field(default=1)),
        ],
    )
    kind.__module__ = "cache_dit.caching.cache_contexts.calibrators"
    pipe = PIPELINES["flux"].build()
    cachedit_fx.enable_cache(pipe, calibrator_config=kind(taylorseer_order=2), inner_backend="eager")
    found = cachedit_fx.integrations.pipelines.enabled_settings(pipe.transformer).config.forecaster
    assert found == TaylorSeerCalibratorConfig(taylorseer_order=2)


def test_former_arguments_of_cache_dit_still_work_and_say_what_replaced_them(caplog):
    pipe = PIPELINES["flux"].build()
    cachedit_fx.enable_cache(pipe, enable_taylorseer=True, taylorseer_order=2, inner_backend="eager")
    found = cachedit_fx.integrations.pipelines.enabled_settings(pipe.transformer).config.forecaster
    assert found == TaylorSeerCalibratorConfig(taylorseer_order=2, enable_encoder_calibrator=False)
    assert "TaylorSeer (enable_taylorseer, taylorseer_order) are deprecated" in caplog.text
    assert "forecaster=TaylorSeerCalibratorConfig(taylorseer_order=2)" in caplog.text


def test_our_own_configuration_is_returned_as_it_is():
    config = CacheConfig(residual_diff_threshold=0.2)
    assert as_cache_config(config) is config
    assert as_cache_config(None) is None


@pytest.mark.parametrize(
    ("fields", "forecaster"),
    [
        (
            {"enable_taylorseer": True, "taylorseer_order": 2, "taylorseer_cache_type": "residual"},
            TaylorSeerCalibratorConfig(taylorseer_order=2, enable_encoder_calibrator=False),
        ),
        ({"enable_dmd": True, "dmd_history": 8}, DMDCalibratorConfig(dmd_history=8)),
        ({"enable_foca": True, "enable_encoder_foca": True, "taylorseer_order": 3}, FoCaCalibratorConfig()),
        ({"enable_taylorseer": False, "taylorseer_order": 2}, None),
    ],
    ids=["taylorseer", "dmd", "foca", "off"],
)
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "flat"])
def test_the_switches_of_a_file_of_cache_dit_choose_the_forecaster(fields, forecaster, is_nested):
    content = {"cache_type": "DBCache", "max_warmup_steps": 2, **fields}
    config = cachedit_fx.load_configs({"cache_config": content} if is_nested else content)["cache_config"]
    assert (config.forecaster, config.max_warmup_steps, config.Fn_compute_blocks) == (forecaster, 2, 8)


def test_arguments_that_are_not_about_caching_are_left_out_with_a_warning(caplog):
    pipe = PIPELINES["flux"].build()
    cachedit_fx.enable_cache(pipe, parallelism_config=None, attention_backend="native", quantize_config=None)
    assert "enable_cache was given parts that are not about caching" in caplog.text
    assert "found: attention_backend\n" in caplog.text
    cachedit_fx.refresh_context(pipe, calibrator_config=TaylorSeerCalibratorConfig())
    with pytest.raises(ConfigError, match="set the same field, got both"):
        cachedit_fx.refresh_context(pipe, calibrator_config=TaylorSeerCalibratorConfig(), forecaster=None)
