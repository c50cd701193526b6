"""The suggestion for an unknown option: by meaning first, then by words, then by letters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from cachedit_fx import CacheConfig, DBCacheConfig, ParamsModifier, enable_cache, load_configs
from cachedit_fx.config.cache_config import split_options
from cachedit_fx.config.fields import OPTION_NAMES
from cachedit_fx.config.synonyms import NO_COUNTERPART, SYNONYMS
from cachedit_fx.errors import ConfigError, did_you_mean
from cachedit_fx.forecasters import PolynomialCalibratorConfig, TaylorSeerCalibratorConfig
from cachedit_fx.policies import Budget, Magnitude, Threshold
from tests import hybrid

OF_TAYLORSEER = "forecaster=TaylorSeerCalibratorConfig(taylorseer_order=...)"
WANTED = {
    # Other names of the same.
    "threshold": "residual_diff_threshold",
    "rdt": "residual_diff_threshold",
    "teacache_thresh": "residual_diff_threshold",
    "rel_l1_thresh": "residual_diff_threshold",
    "warmup_steps": "max_warmup_steps",
    "skip_first": "max_warmup_steps",
    "start_step": "max_warmup_steps",
    "disable_cache_after_step": "final_compute_steps",
    "max_skip_steps": "max_continuous_cached_steps",
    "max_consecutive_cache_hits": "max_continuous_cached_steps",
    "retention_ratio": "start_percent",
    "end_at": "end_percent",
    "mag_ratios": "magnitude_ratios",
    "order": OF_TAYLORSEER,
    "n_derivatives": OF_TAYLORSEER,
    "offload": "cache_device",
    "CPU-offload": "cache_device",
    "interval": "steps_computation_mask",
    "cache_interval": "steps_computation_mask",
    "scm_steps_mask": "steps_computation_mask",
    "scm_policy": "steps_computation_policy",
    "total_steps": "num_inference_steps",
    "do_separate_cfg": "enable_separate_cfg",
    "backend": "inner_backend",
    "Fn": "Fn_compute_blocks",
    "memory_limit": "max_state_bytes",
    "calibrator": "forecaster",
    # Some of the words.
    "fn_blocks": "Fn_compute_blocks",
    "diff_limit": "residual_diff_threshold",
    "accumulated_threshold": "max_accumulated_residual_diff_threshold",
    "guidance_mask": "guidance_computation_mask",
    "dynamic_prune": "enable_dynamic_prune_threshold",
    "debug_folder": "debug_dir",
    "refresh_policy": "force_refresh_step_policy",
    "continuous_steps": "max_continuous_cached_steps",
    # Letters.
    "residul_dif_threshold": "residual_diff_threshold",
    "forcaster": "forecaster",
    "final_compute_step": "final_compute_steps",
}


def shown(suggestion: str) -> str:
    return f" Did you mean {suggestion if '=' in suggestion else repr(suggestion)}?"


@pytest.mark.parametrize(("given", "wanted"), WANTED.items(), ids=WANTED)
def test_an_unknown_option_suggests_the_option_that_means_the_same(given: str, wanted: str):
    with pytest.raises(ConfigError) as caught:
        split_options({given: 3})  # Every option of Inductor is allowed as well.
    first = str(caught.value).partition("\n")[0]
    assert first == f"cachedit_fx: option {given!r} (given 3) is unknown.{shown(wanted)}"


@pytest.mark.parametrize(
    "give",
    [
        lambda **fields: CacheConfig(**fields),
        lambda **fields: DBCacheConfig(**fields),
        lambda **fields: CacheConfig().override(**fields),
        lambda **fields: ParamsModifier(**fields),
        lambda **fields: enable_cache(hybrid.build(), **fields),
        lambda **fields: enable_cache(hybrid.build(), options=fields),
        lambda **fields: load_configs({"cache_config": fields}),
        lambda **fields: load_configs(fields),
    ],
    ids=["config", "cache-dit", "override", "modifier", "enable_cache", "options", "file", "flat-file"],
)
def test_the_suggestion_is_made_wherever_an_option_can_be_given(give: Callable[..., Any]):
    with pytest.raises(ConfigError, match=re.escape("is unknown. Did you mean 'cache_device'?")):
        give(offload=True)


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_an_option_that_has_no_counterpart_says_why(name: str):
    with pytest.raises(ConfigError, match=re.escape(f"is unknown. {NO_COUNTERPART[name]}\n")):
        CacheConfig(**{name: 1})


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Budget(threshold=0.3), "budget"),
        (lambda: Budget(rel_l1_thresh=0.3), "budget"),
        (lambda: Budget(rescale_coefficients=(1.0,)), "coefficients"),
        (lambda: Magnitude(mag_ratios=(1.0,)), "ratios"),
        (lambda: Threshold(residual_diff_threshold=0.1), "threshold"),
        (lambda: TaylorSeerCalibratorConfig(n_derivatives=2), "taylorseer_order"),
        (lambda: PolynomialCalibratorConfig(degree=2), "order"),
    ],
)
def test_a_field_of_a_rule_or_a_forecaster_is_suggested_likewise(make: Callable[[], Any], wanted: str):
    with pytest.raises(ConfigError, match=re.escape(f"is unknown. Did you mean {wanted!r}?")):
        make()


def test_an_option_beside_the_part_for_options_of_a_file_is_told_where_it_belongs():
    with pytest.raises(
        ConfigError, match=r"Move it into cache_config: max_warmup_steps is an option\.\nAllowed: cache"
    ):
        load_configs({"cache_config": {}, "max_warmup_steps": 3})
    with pytest.raises(ConfigError, match=r"no part of a configuration file. Did you mean 'calibrator_config'\?"):
        load_configs({"cache_config": {}, "calibrator": {"type": "taylorseer"}})


def test_every_synonym_leads_to_an_option_and_is_none_itself():
    assert {ours.partition("=")[0] for ours in SYNONYMS.values()} <= {*OPTION_NAMES}
    assert SYNONYMS.keys().isdisjoint({*OPTION_NAMES, *NO_COUNTERPART})


def test_a_common_word_alone_suggests_nothing():
    assert did_you_mean("max", OPTION_NAMES, SYNONYMS, words_of=OPTION_NAMES) == ""
