"""The history of a region in a session, and the decision about one step that becomes part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cachedit_fx.config.cache_config import CacheConfig


class History(NamedTuple):
    """The previous steps of a region in a session.

    Attributes:
        num_steps: The number of steps so far, which is the number of the next step.
        num_cached: The number of reused steps among them.
        num_continuous: The number of reused steps directly before the next step. A guided step ends them, as a computed
            step does.
        accumulated_diff: The sum that the rule compares, over the steps that were reused since the last computed or
            guided step.
        has_moved: Whether the timestep has changed since the first step of the session.
        num_refreshes: The number of refreshes in the session (`force_refresh_step_hint`).
        num_before: The number of steps of the session before the last refresh.
        num_guided: The number of guided steps since the last computed step (`guidance_reuse`).
    """

    num_steps: int = 0
    num_cached: int = 0
    num_continuous: int = 0
    accumulated_diff: float = 0.0
    has_moved: bool = False
    num_refreshes: int = 0
    num_before: int = 0
    num_guided: int = 0

    @property
    def number(self) -> int:
        """The number of the next step among all steps of the session."""
        return self.num_before + self.num_steps

    def after(self, decision: Decision) -> History:
        """This history followed by a step with this decision."""
        reused, continues = not decision.compute, not decision.replaces_values
        accumulated = self.accumulated_diff if decision.accumulated is None else decision.accumulated
        return History(
            num_steps=self.num_steps + 1,
            num_cached=self.num_cached + reused,
            num_continuous=self.num_continuous + 1 if continues else 0,
            accumulated_diff=accumulated if continues else 0.0,
            has_moved=self.has_moved,
            num_refreshes=self.num_refreshes,
            num_before=self.num_before,
            num_guided=self.num_guided + decision.is_guided if reused else 0,
        )

    def refreshed(self) -> History:
        """The history after a refresh. It contains the number of steps and of refreshes, and nothing else."""
        return History(num_refreshes=self.num_refreshes + 1, num_before=self.number)


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about one step.

    Attributes:
        compute: Whether the step computes.
        reason: The reason, for example "diff-below".
        probed: Whether the residual diff was measured.
        threshold: The value that the residual diff, or the sum, was compared with; None if neither was.
        accumulated: The sum since the last computed step, including this step; None if nothing was added.
    """

    compute: bool
    reason: str
    probed: bool = False
    threshold: float | None = field(default=None, compare=False)
    accumulated: float | None = field(default=None, compare=False)

    @property
    def is_guided(self) -> bool:
        """Whether the step follows another guidance branch (`policies.guided_steps`)."""
        return self.reason == "guidance"

    @property
    def replaces_values(self) -> bool:
        """Whether the step replaces the cached values: a computed step by what it computed, a guided step by what the
        other guidance branch predicts."""
        return self.compute or self.is_guided


def needs_refresh(config: CacheConfig, history: History) -> bool:
    """Whether `force_refresh_step_hint` drops all cached values before the next step."""
    is_due = history.num_steps == config.force_refresh_step_hint
    return is_due and (config.force_refresh_step_policy == "repeat" or history.num_refreshes == 0)
