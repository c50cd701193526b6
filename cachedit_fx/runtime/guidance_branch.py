"""The keys of guidance branches and sessions, and the position of a guidance branch in its denoising loop."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

from cachedit_fx.runtime.host_read import Timestep, known
from cachedit_fx.runtime.scheduler_run import SchedulerRun

_label: ContextVar[str | None] = ContextVar("cachedit_fx_label", default=None)
_name: ContextVar[str | None] = ContextVar("cachedit_fx_branch_name", default=None)


class GuidanceBranchKey(NamedTuple):
    """Distinguishes the guidance branches of all requests.

    Attributes:
        owner: Who compiled the graph. Two configurations share nothing.
        who: The name of the request, or the thread and async task.
        label: The caller's name for this guidance branch.
        token: The number of the conditioning; None if there is none, or if the name alone identifies the branch.
    """

    owner: Hashable
    who: Hashable
    label: str | None
    token: int | None


class SessionKey(NamedTuple):
    """Distinguishes the sessions of a module.

    Attributes:
        guidance_branch: The guidance branch.
        ordinal: The position of the call among the calls that the branch makes in one step. Windows, tiles and
            perturbed attention call the model several times with one prompt.
    """

    guidance_branch: GuidanceBranchKey
    ordinal: int = 0


class LoopPosition(NamedTuple):
    """The position of a guidance branch in its denoising loop: its last call.

    Attributes:
        scheduler_run: The scheduler's run of the pipeline that made the call.
        given_timestep: The timestep of the call, which may not have been read.
        calls: The number of calls that the branch has made in this step.
        expected: The number of calls that it made in the step before.
    """

    scheduler_run: SchedulerRun | None = None
    given_timestep: Timestep = None
    calls: int = 0
    expected: int = 0

    @property
    def timestep(self) -> float | None:
        """The timestep of the call. May wait for the device."""
        return known(self.given_timestep)

    def continues_in(self, scheduler_run: SchedulerRun | None) -> bool:
        """Whether a call in `scheduler_run` belongs to the same generation, as far as the scheduler shows."""
        if scheduler_run is None or self.scheduler_run is None:
            return scheduler_run is self.scheduler_run
        return scheduler_run.is_same_run(self.scheduler_run)

    def is_next_step(self, scheduler_run: SchedulerRun | None) -> bool:
        """Whether the scheduler of the pipeline has made a step since."""
        return (
            scheduler_run is not None
            and self.scheduler_run is not None
            and scheduler_run.step_index != self.scheduler_run.step_index
        )

    def predicted_ordinal(self, scheduler_run: SchedulerRun | None) -> int:
        """The expected ordinal of a call whose timestep is unknown: a step has as many calls as the one before."""
        if self.is_next_step(scheduler_run) or not self.continues_in(scheduler_run):
            return 0
        return self.calls if self.calls < self.expected else 0

    def ordinal_at(self, timestep: Timestep, scheduler_run: SchedulerRun | None) -> int:
        """The ordinal of a call at `timestep`."""
        if self.is_next_step(scheduler_run) or not self.continues_in(scheduler_run) or timestep is None:
            return 0
        return self.calls if known(timestep) == self.timestep else 0

    def after(
        self, ordinal: int, timestep: Timestep, scheduler_run: SchedulerRun | None, *, is_first: bool
    ) -> LoopPosition:
        """The position after a call. The first step of a generation (`is_first`) predicts no calls for the second."""
        return LoopPosition(
            scheduler_run, timestep, ordinal + 1, self.expected if ordinal else 0 if is_first else self.calls
        )


LOOP_START = LoopPosition()


def set_label(label: str | None) -> None:
    """Sets the guidance branch for which this thread and async task calls the model from now on; None for no name."""
    _label.set(label)


def current_label() -> str | None:
    """The name of the innermost `within_guidance_branch`, or else the label that `set_label` set, in this context."""
    return _name.get() or _label.get()


@contextlib.contextmanager
def within_guidance_branch(name: str) -> Iterator[None]:
    """Names the guidance branch of the calls in the block. The name alone identifies it, not the conditioning tensor.

    It is for callers that create the conditioning tensor again for every call.
    """
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


def is_identified_by_name() -> bool:
    """Whether the name of the guidance branch identifies it (see `within_guidance_branch`)."""
    return _name.get() is not None
