"""When to compute: a pure function of the configuration, what happened so far, and the diff.

The order of the checks is cache-dit's. Three of its quirks are fixed here: the continuous limit is a true run
length, the accumulated limit counts from the last computed step, and a step whose diff is NaN is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from cachedit_fx.config import CacheConfig


@dataclass(frozen=True, slots=True)
class History:
    """What a region of a session did before this step.

    Attributes:
        num_steps: Steps so far; the session-local number of the step to decide.
        num_cached: Of these, reused.
        num_continuous: Reused steps directly before this one.
        accumulated_diff: Sum of the diffs of the steps reused since the last computed one.
        has_moved: Whether the timestep has changed since the session's first step.
    """

    num_steps: int = 0
    num_cached: int = 0
    num_continuous: int = 0
    accumulated_diff: float = 0.0
    has_moved: bool = False

    def after(self, decision: Decision, diff: float) -> History:
        """The history that includes a step with this decision; a diff that was not looked at counts as none."""
        reused = not decision.compute
        return History(
            num_steps=self.num_steps + 1,
            num_cached=self.num_cached + reused,
            num_continuous=self.num_continuous + 1 if reused else 0,
            accumulated_diff=self.accumulated_diff + (diff if decision.looked else 0.0) if reused else 0.0,
            has_moved=self.has_moved,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step computes, why, and whether the diff was looked at to say so."""

    compute: bool
    reason: str
    looked: bool = False


def decide(config: CacheConfig, history: History, diff: float, *, is_stored: bool) -> Decision:
    """Computes or reuses.

    Args:
        diff: Relative L1 distance, dimensionless, >= 0 or NaN.
        is_stored: Whether there is a residual of this call's shapes.
    """
    step = history.num_steps
    threshold = config.residual_diff_threshold
    if step < config.max_warmup_steps and step % config.warmup_interval == 0:
        return Decision(True, "warmup")
    if history.num_cached >= config.max_cached_steps >= 0:
        return Decision(True, "max-cached")
    if history.num_continuous >= config.max_continuous_cached_steps >= 0:
        return Decision(True, "max-continuous")
    cap = config.max_accumulated_residual_diff_threshold
    if cap is not None and history.accumulated_diff >= cap:
        return Decision(True, "accumulated-diff")
    if threshold <= 0:
        return Decision(True, "threshold-zero")
    if not is_stored:
        return Decision(True, "nothing-stored")
    if not history.has_moved:
        # One-step generations that share a prompt look just like this; nothing tells them apart, so compute.
        return Decision(True, "timestep-still")
    if threshold >= 1:
        return Decision(False, "threshold-one")
    if diff != diff:
        return Decision(True, "nan", looked=True)
    return Decision(False, "diff-below", looked=True) if diff < threshold else Decision(True, "diff-above", looked=True)
