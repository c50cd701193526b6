"""Finds the denoising loop that calls the model, on the Python stack above a call.

A pipeline holds a scheduler, whose `set_timesteps` creates a new tensor at the start of every run. The identity of this
tensor identifies the generation, and the step index of the scheduler shows which calls belong to one step. Both are
read from the object whose `__call__` is on the stack. Nothing is registered or patched, and two pipelines that share a
transformer, in one thread or in several, are distinguished.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import MutableMapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.policies.history import History
from cachedit_fx.policies.position import Progress, num_early_steps

_values_of: MutableMapping[torch.Tensor, tuple[float, ...]] = WeakIdKeyDictionary()


class SchedulerRun(NamedTuple):
    """One run of a scheduler, and its present step.

    Attributes:
        timesteps: The tensor that the scheduler holds during one run of the pipeline.
        step_index: The number of steps that the scheduler has made; None if it does not count them, or before the
            first.
        begin_index: The step index at which the run begins; not 0 if an image is changed instead of made.
        num_timesteps: The number of timesteps that the scheduler holds, including those before `begin_index`.
    """

    timesteps: weakref.ref[torch.Tensor]
    step_index: int | None
    begin_index: int = 0
    num_timesteps: int = 0

    def is_same_run(self, other: SchedulerRun | None) -> bool:
        """Whether both belong to the same run of the same pipeline."""
        mine = self.timesteps()
        return other is not None and mine is not None and other.timesteps() is mine

    def progress(self, history: History, *, reads_timesteps: bool) -> Progress:
        """The place of the present step in the run.

        Args:
            history: The previous steps of the session.
            reads_timesteps: Whether the timesteps are read, which waits for the device once per run.
        """
        # A scheduler that does not count its steps has made those of the session.
        index = history.number if self.step_index is None else self.step_index - self.begin_index
        first = index + self.begin_index - history.num_steps
        early = num_early_steps(self._values(), first) if reads_timesteps else None
        return Progress(index, self.num_timesteps - self.begin_index, early)

    def _values(self) -> tuple[float, ...]:
        timesteps = self.timesteps()
        if timesteps is None:
            return ()
        if timesteps not in _values_of:
            _values_of[timesteps] = tuple(map(float, timesteps.flatten().tolist()))
        return _values_of[timesteps]


_PACKAGE = __name__.partition(".")[0] + "."


def find_scheduler_run() -> SchedulerRun | None:
    """The scheduler's run of the innermost pipeline on the stack; None outside of a pipeline."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # The calls of this package are on every stack. They are skipped, since reading the locals of a frame is slow.
        if frame.f_code.co_name == "__call__" and not _is_ours(frame):
            found = _scheduler_run_of(frame)
            if found is not None:
                return found
        frame = frame.f_back
    return None


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(_PACKAGE)


def _scheduler_run_of(frame: FrameType) -> SchedulerRun | None:
    code = frame.f_code
    if not code.co_argcount:
        return None
    owner: Any = frame.f_locals.get(code.co_varnames[0])
    scheduler = getattr(owner, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor):
        return None
    index, begin = getattr(scheduler, "_step_index", None), getattr(scheduler, "_begin_index", None)
    return SchedulerRun(
        weakref.ref(timesteps),
        index if isinstance(index, int) else None,
        begin if isinstance(begin, int) else 0,
        timesteps.numel(),
    )
