"""One set of defaults at every entry point, and cache-dit's defaults under its names."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx import Backend, BlockAdapter, CacheConfig, DBCacheConfig, DBPruneConfig, ParamsModifier, load_configs
from cachedit_fx.config import RECOMMENDED, BasicCacheConfig
from cachedit_fx.config.cache_config import FIELD_NAMES, check_together, split_options
from cachedit_fx.forecasters import FoCaCalibratorConfig, Forecaster, TaylorSeerCalibratorConfig
from cachedit_fx.integrations.pipelines import enabled_settings
from cachedit_fx.shell.command_arguments import configuration
from cachedit_fx.tuning.cached import threshold_config
from tests import tiny
from tests.sessions import every_session

BASE = dict(Fn_compute_blocks=1, max_warmup_steps=None, residual_diff_threshold=0.2, forecaster=FoCaCalibratorConfig())
CACHE_DIT = dict(Fn_compute_blocks=8, max_warmup_steps=8, residual_diff_threshold=0.08, forecaster=None)

# For every field a value other than the default. Some fields require another field, which is also given.
OTHERS: dict[str, dict[str, Any]] = {
    "Fn_compute_blocks": dict(Fn_compute_blocks=2),
    "Bn_compute_blocks": dict(Bn_compute_blocks=1),
    "residual_diff_threshold": dict(residual_diff_threshold=0.3),
    "max_warmup_steps": dict(max_warmup_steps=2),
    "warmup_interval": dict(warmup_interval=2),
    "max_cached_steps": dict(max_cached_steps=10),
    "max_continuous_cached_steps": dict(max_continuous_cached_steps=2),
    "max_accumulated_residual_diff_threshold": dict(max_accumulated_residual_diff_threshold=0.5),
    "start_percent": dict(start_percent=0.1),
    "end_percent": dict(end_percent=0.9),
    "final_compute_steps": dict(final_compute_steps=2),
    "num_inference_steps": dict(num_inference_steps=28),
    "steps_computation_mask": dict(steps_computation_mask=(1, 0)),
    "steps_computation_policy": dict(steps_computation_policy="static"),
    "force_refresh_step_hint": dict(force_refresh_step_hint=4),
    "force_refresh_step_policy": dict(force_refresh_step_policy="repeat"),
    "enable_separate_cfg": dict(enable_separate_cfg=True),
    "cfg_compute_first": dict(cfg_compute_first=True),
    "cfg_diff_compute_separate": dict(cfg_diff_compute_separate=False),
    "cache_type": dict(cache_type="DBPrune"),
    "enable_dynamic_prune_threshold": dict(enable_dynamic_prune_threshold=True),
    "max_dynamic_prune_threshold": dict(max_dynamic_prune_threshold=0.3),
    "dynamic_prune_threshold_relax_ratio": dict(dynamic_prune_threshold_relax_ratio=1.5),
    "non_prune_block_ids": dict(non_prune_block_ids=(1,)),
    "inner_backend": dict(inner_backend="eager"),
    "on_no_match": dict(on_no_match="raise"),
    "regions": dict(regions="per_list"),
    "compile_blocks": dict(compile_blocks="inline"),
    "mode": dict(mode="default"),
    "forecaster": dict(forecaster=None),
    "reach": dict(reach="output"),
    "probe": dict(probe="modulated_input"),
    "batch_decision": dict(batch_decision="any"),
    "decision_rule": dict(decision_rule="budget"),
    "rescale_coefficients": dict(rescale_coefficients=(2.0, 0.0), decision_rule="budget"),
    "magnitude_ratios": dict(magnitude_ratios=(1.0, 1.0), probe="timestep", decision_rule="budget"),
    "decider": dict(decider=type("Never", (), {"decide": lambda self, step: None})()),
    "guidance_reuse": dict(guidance_reuse="difference"),
    "max_continuous_guidance_steps": dict(max_continuous_guidance_steps=1),
    "guidance_computation_mask": dict(guidance_computation_mask=(1, 0)),
    "guidance_reuse_threshold": dict(guidance_reuse_threshold=0.2),
    "fast_dispatch": dict(fast_dispatch=False),
    "shadow": dict(shadow=True),
    "debug_dir": dict(debug_dir="dumps"),
    "cache_device": dict(cache_device="cpu"),
    "max_state_bytes": dict(max_state_bytes=1 << 20),
}


def values(config: CacheConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FIELD_NAMES}


def enabled_with(*args: Any, target: Any = None, **given: Any) -> CacheConfig:
    module = tiny.build() if target is None else target.transformer
    cachedit_fx.enable_cache(module if target is None else target, *args, **given)
    settings = enabled_settings(module)
    assert settings is not None
    return settings.config


# The defaults.


def test_the_defaults_are_the_recommended_values():
    assert {name: getattr(CacheConfig(), name) for name in BASE} == BASE
    assert CacheConfig() == RECOMMENDED


def adapter() -> BlockAdapter:
    return BlockAdapter(transformer=tiny.build())


def from_shell(**fields: Any) -> CacheConfig:
    given = argparse.Namespace(config=None, option=[f"{name}={value}" for name, value in fields.items()])
    return configuration(given).get("cache_config", RECOMMENDED)


WAYS_IN = {
    "enable_cache": enabled_with,
    "enable_cache-adapter": lambda **fields: enabled_with(target=adapter(), **fields),
    "enable_cache-modifiers": lambda **fields: enabled_with(params_modifiers=ParamsModifier(), **fields),
    "enable_cache-options": lambda **fields: enabled_with(options=fields),
    "torch.compile": lambda **fields: split_options(fields)[0],
    "backend": lambda **fields: Backend(CacheConfig(**fields)).config,
    "command-line": from_shell,
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    "fields", [{}, {"residual_diff_threshold": 0.3}, {"max_cached_steps": 10}, {"num_inference_steps": 28}]
)
def test_every_entry_point_starts_from_the_defaults(way, fields):
    assert values(WAYS_IN[way](**fields)) == values(CacheConfig()) | BASE | fields


def test_a_calibrator_replaces_only_the_forecaster():
    calibrator = TaylorSeerCalibratorConfig()
    assert enabled_with(calibrator_config=calibrator) == CacheConfig(forecaster=calibrator)


def test_a_tuned_threshold_starts_from_the_defaults():
    forecaster = TaylorSeerCalibratorConfig()
    found = threshold_config(0.2, forecaster)
    set_by_tune = {name: getattr(found, name) for name in found.given}
    assert values(found) == values(CacheConfig()) | set_by_tune


def test_every_field_is_in_the_table():
    assert list(OTHERS) == list(FIELD_NAMES)
    assert all(fields[name] != getattr(CacheConfig(), name) for name, fields in OTHERS.items())


@pytest.mark.parametrize("field", OTHERS)
def test_setting_a_field_changes_no_other_field_and_contradicts_no_default(field):
    config = CacheConfig().override(**OTHERS[field])
    check_together(config)
    assert values(config) == values(CacheConfig()) | OTHERS[field]


def test_pruning_works_on_top_of_the_defaults():
    """The timestep changes so little that every block after the first is reused at some step after the warm-up."""
    module = cachedit_fx.enable_cache(tiny.build(), cache_type="DBPrune", inner_backend="eager", on_no_match="raise")
    with torch.no_grad():
        tiny.generate(module, tiny.prompt(), tiny.latents(), [1.0 - i / 100 for i in range(10)])
    found = every_session(module)
    assert len(found) == 3  # One of the four blocks is always computed.
    assert all(stats.decisions[:8] == ["warmup"] * 8 and stats.cached_steps for stats in found)


def test_the_defaults_reuse_steps():
    """The diff is |t - t'| / (1 + t'), which is below 0.2 at some of these times after the warm-up."""
    module = cachedit_fx.enable_cache(tiny.build(), inner_backend="eager")
    with torch.no_grad():
        tiny.generate(module, tiny.prompt(), tiny.latents(), [1.0 - i / 12 for i in range(12)])
    (stats,) = cachedit_fx.summary(module, logging=False)
    assert stats.decisions[:8] == ["warmup"] * 8
    assert 8 in stats.cached_steps


def test_torch_compile_caches_a_model_that_explain_reports_as_cached():
    """The model has four blocks; with the eight Fn blocks of cache-dit's defaults nothing could be cached."""
    module, prompt, latents = tiny.build(), tiny.prompt(), tiny.latents()
    assert cachedit_fx.explain(module, latents, prompt, torch.ones(len(latents))).is_cached
    compiled = torch.compile(module, backend="cachedit", options={"inner_backend": "eager"})
    with torch.no_grad():
        tiny.step(compiled, prompt, 1.0, latents)
    assert cachedit_fx.is_cached(module)


# The defaults of cache-dit.


@pytest.mark.parametrize("make", [DBCacheConfig, BasicCacheConfig, DBPruneConfig, CacheConfig.cache_dit_defaults])
def test_the_configurations_named_as_in_cache_dit_have_its_defaults(make):
    kind = {"cache_type": "DBPrune"} if make is DBPruneConfig else {}
    assert values(make()) == values(CacheConfig()) | CACHE_DIT | kind
    assert values(make(max_cached_steps=2)) == values(make()) | {"max_cached_steps": 2}
    assert isinstance(make(), CacheConfig)
    assert make().given == set(kind)


@pytest.mark.parametrize("make", [DBCacheConfig, DBPruneConfig])
def test_an_explicit_configuration_keeps_its_defaults(make):
    assert enabled_with(make(max_cached_steps=2), inner_backend="eager") == make(
        max_cached_steps=2, inner_backend="eager"
    )
    assert enabled_with(make(), target=adapter()) == make()
    assert Backend(make()).config == make()


def test_fields_missing_from_a_file_have_the_defaults_of_cache_dit():
    assert load_configs({"max_cached_steps": 2})["cache_config"] == DBCacheConfig(max_cached_steps=2)
    assert load_configs({"cache_type": "DBPrune"})["cache_config"] == DBPruneConfig()


def test_fields_missing_from_a_file_of_tune_have_the_defaults_of_the_package():
    content = {"cache_config": {"max_warmup_steps": 2}, "tuned": {"signature": {"steps": 8}}}
    assert load_configs(content)["cache_config"] == CacheConfig(max_warmup_steps=2)


@pytest.mark.parametrize("make", [DBCacheConfig, DBPruneConfig])
def test_only_the_given_fields_of_a_partial_configuration_count(make):
    module = cachedit_fx.enable_cache(tiny.build(), Fn_compute_blocks=2)
    cachedit_fx.refresh_context(module, make(max_cached_steps=2))
    settings = enabled_settings(module)
    kind = {"cache_type": "DBPrune"} if make is DBPruneConfig else {}
    assert settings is not None
    assert settings.config == CacheConfig(Fn_compute_blocks=2, max_cached_steps=2, **kind)
    assert dict(ParamsModifier(make(max_cached_steps=2)).cache_config.changes) == {"max_cached_steps": 2, **kind}


# Configurations as values.


def test_configurations_are_equal_if_their_fields_are():
    spelt_out = CacheConfig(**CACHE_DIT)
    assert spelt_out == DBCacheConfig()
    assert hash(spelt_out) == hash(DBCacheConfig())
    assert DBCacheConfig(**BASE) == CacheConfig()
    assert DBCacheConfig() != CacheConfig()
    assert DBPruneConfig() == DBCacheConfig(cache_type="DBPrune")
    assert DBCacheConfig() != "DBCacheConfig()"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
@pytest.mark.parametrize("make", [CacheConfig, DBCacheConfig, DBPruneConfig])
def test_a_copy_keeps_its_class_and_defaults(make, copied):
    found = copied(make(max_cached_steps=2))
    assert (type(found), found, found.given) == (make, make(max_cached_steps=2), make(max_cached_steps=2).given)
    assert found.override(max_cached_steps=3) == make(max_cached_steps=3)
    assert type(found.override(max_cached_steps=3)) is make


@pytest.mark.parametrize(
    "config", [CacheConfig(), DBCacheConfig(), DBPruneConfig(max_cached_steps=2), CacheConfig(forecaster=None)]
)
def test_the_changes_written_to_a_file_restore_the_configuration(config):
    assert CacheConfig(**json.loads(json.dumps(dict(config.plain_changes)))) == config


def test_a_forecaster_without_a_name_is_written_as_none():
    """If it were omitted, the default would be read."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Forecaster):
        pass

    assert CacheConfig(forecaster=Mine()).plain_changes == [("forecaster", None)]


def test_a_field_of_cache_config_is_written_even_if_it_has_its_default():
    assert CacheConfig(Fn_compute_blocks=1).plain_changes == [("Fn_compute_blocks", 1)]
