"""What `enable_cache(pipe)` does where nothing is set."""

from __future__ import annotations

from collections.abc import Collection

from cachedit_fx.config import CacheConfig
from cachedit_fx.forecasters.foca import FoCaCalibratorConfig

# Chosen on the digits (docs/quality.md): of what needs nothing known of a model, FoCa is best at every threshold (0.12:
# 61.9 dB; TaylorSeer of order 1: 58.7; the last residual: 47.2), and 0.12 keeps the images nearly as they are.
RECOMMENDED = CacheConfig(
    Fn_compute_blocks=1,
    max_warmup_steps=4,
    residual_diff_threshold=0.12,
    forecaster=FoCaCalibratorConfig(),
)

_ASIDE = frozenset(
    ("inner_backend", "on_no_match", "compile_blocks", "mode", "fast_dispatch", "shadow", "debug_dir"),
)


def base_for(given: Collection[str]) -> CacheConfig:
    """What the `given` fields change: the recommended configuration if none of them is about when or what to reuse."""
    return RECOMMENDED if _ASIDE.issuperset(given) else CacheConfig()
