"""What `enable_cache(pipe)` does where nothing is set."""

from __future__ import annotations

from collections.abc import Collection

from cachedit_fx.config import CacheConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig

# Chosen on the digits (docs/quality.md): of the configurations that need nothing known of the model, it keeps the images
# nearly as they are (59 dB). cache-dit's own defaults run 8 blocks, 8 steps, and repeat the last residual.
RECOMMENDED = CacheConfig(
    Fn_compute_blocks=1,
    max_warmup_steps=4,
    residual_diff_threshold=0.12,
    forecaster=TaylorSeerCalibratorConfig(taylorseer_order=1),
)

_ASIDE = frozenset(("inner_backend", "on_no_match", "compile_blocks", "mode", "shadow", "debug_dir"))


def base_for(given: Collection[str]) -> CacheConfig:
    """What the `given` fields change: the recommended configuration if none of them is about when or what to reuse."""
    return RECOMMENDED if _ASIDE.issuperset(given) else CacheConfig()
