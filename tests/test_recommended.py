"""What `enable_cache` takes where nothing is set, and that anything set is taken on top of the plain defaults."""

from __future__ import annotations

import pytest
import torch

import cachedit_fx
from cachedit_fx import RECOMMENDED, CacheConfig, TaylorSeerCalibratorConfig
from cachedit_fx.pipeline import enabled_settings
from tests import tiny


def config_of(*args: object, **given: object) -> CacheConfig:
    module = cachedit_fx.enable_cache(tiny.build(), *args, **given)
    settings = enabled_settings(module)
    assert settings is not None
    return settings.config


def test_nothing_set_takes_what_is_recommended():
    assert config_of() == RECOMMENDED


@pytest.mark.parametrize(
    "field", [{"inner_backend": "eager"}, {"compile_blocks": "inline"}, {"fast_dispatch": False}, {"shadow": True}]
)
def test_so_does_what_says_nothing_of_reuse(field):
    assert config_of(**field) == RECOMMENDED.override(**field)


@pytest.mark.parametrize("field", [{"Fn_compute_blocks": 2}, {"residual_diff_threshold": 0.2}, {"forecaster": "foca"}])
def test_anything_else_is_taken_on_top_of_the_plain_defaults(field):
    assert config_of(**field) == CacheConfig(**field)


def test_a_configuration_is_taken_as_it_is():
    assert config_of(CacheConfig()) == CacheConfig()


def test_an_adapter_says_enough_to_be_taken_on_top_of_the_plain_defaults():
    module = tiny.build()
    cachedit_fx.enable_cache(cachedit_fx.BlockAdapter(transformer=module))
    settings = enabled_settings(module)
    assert settings is not None and settings.config == CacheConfig()


def test_a_calibrator_is_taken_on_top_of_the_plain_defaults():
    calibrator = TaylorSeerCalibratorConfig()
    assert config_of(calibrator_config=calibrator) == CacheConfig(forecaster=calibrator)


def test_it_reuses():
    """The diff is |t - t'| / (1 + t'), so that at these times every other step after the warm-up is below 0.12."""
    module = cachedit_fx.enable_cache(tiny.build(), inner_backend="eager")
    with torch.no_grad():
        tiny.generate(module, tiny.prompt(), tiny.latents(), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    (stats,) = cachedit_fx.summary(module, logging=False)
    assert stats.decisions[:4] == ["warmup"] * 4
    assert 4 in stats.cached_steps
