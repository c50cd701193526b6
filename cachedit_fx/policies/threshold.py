"""The rule "threshold": reuse while the diff since the last computed step is small."""

from __future__ import annotations

from collections.abc import Sequence

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.policies.history import Decision, History

_NUM_PRUNE_DIFFS = 5  # Diffs at the front of a step that a dynamic prune threshold is the mean of.


def by_threshold(threshold: float, history: History, diff: float) -> Decision:
    """Reuses if the diff is strictly below the threshold; at one of 1 or more always, without a look.

    Args:
        diff: Relative L1 distance from the last computed step, dimensionless, >= 0 or NaN.
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
    """The threshold, or where it is dynamic the relaxed mean of the first diffs of this step, if that is larger."""
    base = config.residual_diff_threshold
    known = [diff for diff in earlier[:_NUM_PRUNE_DIFFS] if diff > 0]
    if not config.enable_dynamic_prune_threshold or not known:
        return base
    relaxed = sum(known) / len(known) * config.dynamic_prune_threshold_relax_ratio
    cap = 2 * base if config.max_dynamic_prune_threshold is None else config.max_dynamic_prune_threshold
    return max(base, relaxed) if relaxed < cap else base
