"""What a region of a session did so far: `History`, which a `Decision` is made from and becomes part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cachedit_fx.config.cache_config import CacheConfig


class History(NamedTuple):
    """What a region of a session did before this step.

    Attributes:
        num_steps: Steps so far; the session-local number of the step to decide.
        num_cached: Of these, reused.
        num_continuous: Reused steps directly before this one.
        accumulated_diff: Sum of the diffs of the steps reused since the last computed one, as the rule adds them up.
        has_moved: Whether the timestep has changed since the session's first step.
        num_refreshes: How often all this was begun anew within the session.
        num_before: Steps of the session before it was begun anew.
    """

    num_steps: int = 0
    num_cached: int = 0
    num_continuous: int = 0
    accumulated_diff: float = 0.0
    has_moved: bool = False
    num_refreshes: int = 0
    num_before: int = 0

    @property
    def number(self) -> int:
        """The number of the step to decide, among all of the session."""
        return self.num_before + self.num_steps

    def after(self, decision: Decision) -> History:
        """The history that includes a step with this decision."""
        reused = not decision.compute
        accumulated = self.accumulated_diff if decision.accumulated is None else decision.accumulated
        return History(
            num_steps=self.num_steps + 1,
            num_cached=self.num_cached + reused,
            num_continuous=self.num_continuous + 1 if reused else 0,
            accumulated_diff=accumulated if reused else 0.0,
            has_moved=self.has_moved,
            num_refreshes=self.num_refreshes,
            num_before=self.num_before,
        )

    def refreshed(self) -> History:
        """The history of a session that begins anew: only its length and how often that happened are known."""
        return History(num_refreshes=self.num_refreshes + 1, num_before=self.number)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step computes, why, and whether the diff was looked at to say so.

    Attributes:
        threshold: What the diff, or the sum of the diffs, was held against; None where neither was looked at.
        accumulated: The sum of the diffs since the last computed step, with this one's; None where nothing was added.
    """

    compute: bool
    reason: str
    probed: bool = False
    threshold: float | None = field(default=None, compare=False)
    accumulated: float | None = field(default=None, compare=False)


def needs_refresh(config: CacheConfig, history: History) -> bool:
    """Whether `force_refresh_step_hint` wants all to be forgotten before the next step."""
    is_due = history.num_steps == config.force_refresh_step_hint
    return is_due and (config.force_refresh_step_policy == "repeat" or history.num_refreshes == 0)
