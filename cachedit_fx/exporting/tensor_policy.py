"""The decision about a step as tensor operations: the same checks as `policies.decide`, in the same order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.policies.decide import num_warmup_steps


@dataclass(frozen=True, slots=True)
class TensorHistory:
    """The previous steps of a region: the fields of `History` that the rules read, as tensors without dimensions.

    Attributes:
        num_steps, num_cached, num_continuous: int64.
        accumulated_diff: float64.
    """

    num_steps: Tensor
    num_cached: Tensor
    num_continuous: Tensor
    accumulated_diff: Tensor


def decide_in_tensors(
    config: CacheConfig, history: TensorHistory, diff: Tensor, threshold: Tensor, is_cached: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns whether the step computes (bool), and the accumulated diff after it (float64).

    Args:
        diff: The residual diff, float64, >= 0 or NaN.
        threshold: `residual_diff_threshold`, float64.
        is_cached: Whether there are cached values, bool.
    """
    reuses, total = _by_rule(config, history, diff, threshold)
    computes = _forbidden(config, history, threshold) | ~is_cached | ~reuses
    return computes, torch.where(computes, torch.zeros_like(total), total)


def _by_rule(config: CacheConfig, history: TensorHistory, diff: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the rule reuses the step, and the sum of the diffs of the reused steps including this one."""
    before = history.accumulated_diff
    if config.is_static:
        return torch.ones_like(threshold, dtype=torch.bool), before
    if config.decision_rule == "threshold":
        is_one = threshold >= 1  # The diff is not measured then.
        return is_one | (diff < threshold), torch.where(is_one, before, before + diff)
    total = before + _rescaled(config, diff)
    return total < threshold, total


def _rescaled(config: CacheConfig, diff: Tensor) -> Tensor:
    if not config.rescale_coefficients:
        return diff
    value = torch.zeros_like(diff)
    for coefficient in config.rescale_coefficients:
        value = value * diff + coefficient
    return value


def _forbidden(config: CacheConfig, history: TensorHistory, threshold: Tensor) -> Tensor:
    """Whether the step must be computed, whatever its residual diff is."""
    step = history.num_steps
    found = (step < num_warmup_steps(config)) & (step % config.warmup_interval == 0)
    if config.steps_computation_mask is not None:
        mask = torch.tensor([bool(entry) for entry in config.steps_computation_mask], device=step.device)
        found = found | ((step < len(mask)) & torch.take(mask, step.clamp(max=len(mask) - 1)))
    if config.is_static:
        return found
    if config.max_cached_steps >= 0:
        found = found | (history.num_cached >= config.max_cached_steps)
    if config.max_continuous_cached_steps >= 0:
        found = found | (history.num_continuous >= config.max_continuous_cached_steps)
    cap = config.max_accumulated_residual_diff_threshold
    if cap is not None and cap > 0:
        found = found | (history.accumulated_diff >= cap)
    return found | (threshold <= 0)
