"""Guidance reuse: decides whether a guidance branch follows another one in place of running its blocks."""

from __future__ import annotations

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.policies.decide import max_warmup_steps, num_warmup_steps
from cachedit_fx.policies.history import Decision, History
from cachedit_fx.policies.position import Progress, must_compute


def by_guidance(
    config: CacheConfig, history: History, diff: float, progress: Progress | None = None
) -> Decision | None:
    """The decision for a step that the first guidance branch of the step computed.

    Args:
        history: The previous steps of the region in this guidance branch.
        diff: Its own residual diff, dimensionless, >= 0 or NaN. It is not read without `guidance_reuse_threshold`.
        progress: The place of the step in its generation, as for `decide`.

    Returns:
        None if the step is decided like any other: warm-up, the ends of a generation (`start_percent`), a generation
        whose timestep has not changed yet, or a configuration that allows no reused step.
    """
    step, mask, limit = history.num_steps, config.guidance_computation_mask, config.guidance_reuse_threshold
    is_full = history.num_cached >= config.max_cached_steps >= 0
    is_off = config.residual_diff_threshold <= 0 and not config.is_static
    progress = progress or Progress(history.number, config.num_inference_steps)
    if must_compute(config, progress):
        return None
    if step < num_guidance_warmup_steps(config, progress) or not history.has_moved or is_full or is_off:
        return None
    if mask is not None and step < len(mask) and mask[step]:
        return Decision(True, "guidance-mask")
    if history.num_guided >= config.max_continuous_guidance_steps >= 0:
        return Decision(True, "guidance-continuous")
    if limit is None:
        return Decision(False, "guidance")
    return Decision(False, "guidance", True, limit) if diff < limit else Decision(True, "guidance-above", True, limit)


def num_guidance_warmup_steps(config: CacheConfig, progress: Progress | None = None) -> int:
    """The number of steps that every guidance branch computes itself, unless `warmup_interval` leaves one out."""
    mask = config.guidance_computation_mask
    if mask is None:
        return num_warmup_steps(config, progress)
    return min(max_warmup_steps(config, progress), (*mask, 0).index(0))
