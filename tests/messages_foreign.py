"""The rows of `messages_table` about configurations of other caches."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

from cachedit_fx import load_configs
from cachedit_fx.integrations.foreign_configs import as_cache_config, without_legacy
from tests.messages_table import Row


def of_cache_dit(**fields: Any) -> Any:
    """An object like a configuration of cache-dit with the given fields, each away from its default."""
    declared = [(name, Any, dataclasses.field(default=None)) for name in fields]
    kind = dataclasses.make_dataclass("DBCacheConfig", declared)
    kind.__module__ = "cache_dit.caching"
    return kind(**fields)


def without_dataclass() -> Any:
    return type("DBCacheConfig", (), {"__module__": "cache_dit.caching"})()


ROWS = [
    Row(
        "foreign-threshold",
        lambda _: as_cache_config(FirstBlockCacheConfig(threshold=1.5)),
        "got 1.5",
        "FirstBlockCacheConfig.threshold must be below 1",
    ),
    Row(
        "foreign-calibrate",
        lambda _: as_cache_config(MagCacheConfig(calibrate=True)),
        "got True",
        "MagCacheConfig.calibrate must be False",
    ),
    Row(
        "foreign-layers",
        lambda _: as_cache_config(TaylorSeerCacheConfig(use_lite_mode=True)),
        "got True",
        "TaylorSeerCacheConfig.use_lite_mode must be left at its default",
    ),
    Row(
        "foreign-kind",
        lambda _: as_cache_config(PyramidAttentionBroadcastConfig()),
        "got a PyramidAttentionBroadcastConfig",
        "reuses parts inside of the blocks",
    ),
    Row("foreign-object", lambda _: as_cache_config(3), "got 3", "cache_config must be a CacheConfig"),
    Row(
        "foreign-no-fields",
        lambda _: as_cache_config(without_dataclass()),
        "got a DBCacheConfig",
        "cache_config must be a CacheConfig",
    ),
    Row(
        "foreign-field",
        lambda _: as_cache_config(of_cache_dit(force_reduce_calibrator_vram=True)),
        "DBCacheConfig.force_reduce_calibrator_vram=True",
        "is ignored: it has no counterpart here",
    ),
    Row(
        "foreign-former-argument",
        lambda _: without_legacy({"enable_taylorseer": True, "taylorseer_order": 2}, None),
        "enable_taylorseer, taylorseer_order",
        "TaylorSeerCalibratorConfig(taylorseer_order=2)",
    ),
    Row(
        "foreign-two-calibrators",
        lambda _: load_configs({"enable_taylorseer": True, "enable_foca": True}),
        "got enable_taylorseer and enable_foca",
        "a file must enable one calibrator at most",
    ),
    Row(
        "foreign-file-without-cache",
        lambda _: load_configs({"parallelism_config": None}),
        "got neither",
        "a configuration file must have a cache_config",
    ),
    Row(
        "foreign-file",
        lambda _: load_configs({"cache_config": {}, "attention_backend": "sage"}),
        "found: attention_backend",
        "transformer.set_attention_backend(...) of diffusers",
    ),
]
