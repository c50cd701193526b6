"""The rule "threshold": a step is reused if its residual diff is small."""

from __future__ import annotations

from collections.abc import Sequence

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.policies.history import Decision, History

_NUM_PRUNE_DIFFS = 5  # A dynamic prune threshold is the mean of so many residual diffs of the first regions.


def by_threshold(threshold: float, history: History, diff: float) -> Decision:
    """Reuses the step if its residual diff is strictly below the threshold, or if the threshold is 1 or more.

    Args:
        diff: The residual diff, dimensionless, >= 0 or NaN. It is not read if the threshold is 1 or more.
    """
    if threshold >= 1:
        return Decision(False, "threshold-one")
    total = history.accumulated_diff + diff
    if diff != diff:
        return Decision(True, "nan", True, threshold, total)
    if diff < threshold:
        return Decision(False, "diff-below", True, threshold, total)
    return Decision(True, "diff-above", True, threshold, total)


def relaxed_threshold(config: CacheConfig, earlier: Sequence[float]) -> float:
    """The threshold. If it is dynamic, the relaxed mean of the first residual diffs of this step, if that is larger."""
    base = config.residual_diff_threshold
    known = [diff for diff in earlier[:_NUM_PRUNE_DIFFS] if diff > 0]
    if not config.enable_dynamic_prune_threshold or not known:
        return base
    relaxed = sum(known) / len(known) * config.dynamic_prune_threshold_relax_ratio
    cap = 2 * base if config.max_dynamic_prune_threshold is None else config.max_dynamic_prune_threshold
    return max(base, relaxed) if relaxed < cap else base
