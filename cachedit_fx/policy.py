"""When to compute: a pure function of the configuration, what happened so far, and the diff.

The order of the checks is cache-dit's. Two of its quirks are fixed here: the accumulated limit counts reused steps
from the last computed one, and a step whose diff is NaN is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cachedit_fx.config import CacheConfig

_NUM_PRUNE_DIFFS = 5  # Diffs at the front of a step that a dynamic prune threshold is the mean of.


@dataclass(frozen=True, slots=True)
class History:
    """What a region of a session did before this step.

    Attributes:
        num_steps: Steps so far; the session-local number of the step to decide.
        num_cached: Of these, reused.
        num_continuous: Reused steps directly before this one.
        accumulated_diff: Sum of the diffs of the steps reused since the last computed one.
        has_moved: Whether the timestep has changed since the session's first step.
        num_refreshes: How often all this was begun anew within the session.
    """

    num_steps: int = 0
    num_cached: int = 0
    num_continuous: int = 0
    accumulated_diff: float = 0.0
    has_moved: bool = False
    num_refreshes: int = 0

    def after(self, decision: Decision, diff: float) -> History:
        """The history that includes a step with this decision; a diff that was not looked at counts as none."""
        reused = not decision.compute
        return History(
            num_steps=self.num_steps + 1,
            num_cached=self.num_cached + reused,
            num_continuous=self.num_continuous + 1 if reused else 0,
            accumulated_diff=self.accumulated_diff + (diff if decision.looked else 0.0) if reused else 0.0,
            has_moved=self.has_moved,
            num_refreshes=self.num_refreshes,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step computes, why, and whether the diff was looked at to say so.

    Attributes:
        threshold: What the diff was held against; None where it was not looked at.
    """

    compute: bool
    reason: str
    looked: bool = False
    threshold: float | None = field(default=None, compare=False)


def needs_refresh(config: CacheConfig, history: History) -> bool:
    """Whether `force_refresh_step_hint` wants all to be forgotten before the next step."""
    is_due = history.num_steps == config.force_refresh_step_hint
    return is_due and (config.force_refresh_step_policy == "repeat" or history.num_refreshes == 0)


def decide(
    config: CacheConfig, history: History, diff: float, *, is_stored: bool, earlier: Sequence[float] = ()
) -> Decision:
    """Computes or reuses.

    Args:
        diff: Relative L1 distance, dimensionless, >= 0 or NaN.
        is_stored: Whether there is a residual of this call's shapes.
        earlier: Diffs of the regions before this one at the same step, for a dynamic prune threshold.
    """
    step = history.num_steps
    if step < _num_warmup_steps(config) and step % config.warmup_interval == 0:
        return Decision(True, "warmup")
    is_forced = False
    if config.steps_computation_mask is not None:
        if step < len(config.steps_computation_mask) and config.steps_computation_mask[step]:
            return Decision(True, "mask")
        is_forced = config.is_static
    threshold = _threshold(config, earlier)
    limit = None if is_forced else _limit(config, history, threshold)
    if limit is not None:
        return Decision(True, limit)
    if not is_stored:
        return Decision(True, "nothing-stored")
    if not history.has_moved:
        # One-step generations that share a prompt look just like this; nothing tells them apart, so compute.
        return Decision(True, "timestep-still")
    if is_forced:
        return Decision(False, "mask-static")
    if threshold >= 1:
        return Decision(False, "threshold-one")
    if diff != diff:
        return Decision(True, "nan", looked=True, threshold=threshold)
    is_below = diff < threshold
    return Decision(not is_below, "diff-below" if is_below else "diff-above", looked=True, threshold=threshold)


def _num_warmup_steps(config: CacheConfig) -> int:
    mask = config.steps_computation_mask
    leading = config.max_warmup_steps if mask is None else (*mask, 0).index(0)
    return min(config.max_warmup_steps, leading)


def _limit(config: CacheConfig, history: History, threshold: float) -> str | None:
    """The limit that forbids to reuse, if one does."""
    if history.num_cached >= config.max_cached_steps >= 0:
        return "max-cached"
    if history.num_continuous >= config.max_continuous_cached_steps >= 0:
        return "max-continuous"
    cap = config.max_accumulated_residual_diff_threshold
    if cap is not None and history.accumulated_diff >= cap > 0:
        return "accumulated-diff"
    return "threshold-zero" if threshold <= 0 else None


def _threshold(config: CacheConfig, earlier: Sequence[float]) -> float:
    """The threshold, or where it is dynamic the relaxed mean of the first diffs of this step, if that is larger."""
    base = config.residual_diff_threshold
    known = [diff for diff in earlier[:_NUM_PRUNE_DIFFS] if diff > 0]
    if not config.enable_dynamic_prune_threshold or not known:
        return base
    relaxed = sum(known) / len(known) * config.dynamic_prune_threshold_relax_ratio
    cap = 2 * base if config.max_dynamic_prune_threshold is None else config.max_dynamic_prune_threshold
    return max(base, relaxed) if relaxed < cap else base
