"""Guidance branches of a request, and which of a step's calls a call is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from cachedit_fx.runtime.scheduler_run import SchedulerRun


class GuidanceBranchKey(NamedTuple):
    """What tells one guidance branch of one request from another.

    Attributes:
        owner: Whoever compiled the graph: two configurations share nothing.
        who: The request's name, or the thread and async task.
        label: What the pipeline calls this guidance branch.
        token: Number of the conditioning.
    """

    owner: Hashable
    who: Hashable
    label: str | None
    token: int | None


class SessionKey(NamedTuple):
    """What tells one session of a module from another.

    Attributes:
        guidance_branch: The guidance branch.
        ordinal: Which of the branch's calls of a step: windows, tiles and perturbed attention call the model several
            times with one prompt.
    """

    guidance_branch: GuidanceBranchKey
    ordinal: int = 0


class LoopPosition(NamedTuple):
    """Where a branch stands in its denoising loop: its last call.

    Attributes:
        scheduler_run: Of the pipeline that made it.
        timestep: That it was made at.
        calls: Calls of the branch at this step so far.
        expected: Calls at the step before.
    """

    scheduler_run: SchedulerRun | None = None
    timestep: float | None = None
    calls: int = 0
    expected: int = 0

    def goes_on_in(self, scheduler_run: SchedulerRun | None) -> bool:
        """Whether a call from there belongs to the same generation, as far as the pipeline tells."""
        if scheduler_run is None or self.scheduler_run is None:
            return scheduler_run is self.scheduler_run
        return scheduler_run.is_same_run(self.scheduler_run)

    def is_next_step(self, scheduler_run: SchedulerRun | None) -> bool:
        """Whether the pipeline's scheduler has taken a step since."""
        return (
            scheduler_run is not None
            and self.scheduler_run is not None
            and scheduler_run.step_index != self.scheduler_run.step_index
        )

    def predicted_ordinal(self, scheduler_run: SchedulerRun | None) -> int:
        """The ordinal that a call has if a step has as many calls as the one before: its timestep is not known yet."""
        if self.is_next_step(scheduler_run) or not self.goes_on_in(scheduler_run):
            return 0
        return self.calls if self.calls < self.expected else 0

    def ordinal_at(self, timestep: float | None, scheduler_run: SchedulerRun | None) -> int:
        """The ordinal of a call at `timestep`."""
        if self.is_next_step(scheduler_run) or not self.goes_on_in(scheduler_run) or timestep is None:
            return 0
        return self.calls if timestep == self.timestep else 0

    def after(
        self, ordinal: int, timestep: float | None, scheduler_run: SchedulerRun | None, *, is_first: bool
    ) -> LoopPosition:
        """With a call that was made; of a generation's first step nothing follows for its second."""
        return LoopPosition(
            scheduler_run, timestep, ordinal + 1, self.expected if ordinal else 0 if is_first else self.calls
        )


LOOP_START = LoopPosition()
