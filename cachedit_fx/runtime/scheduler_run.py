"""Which denoising loop calls the model: what the Python stack above a call tells.

A pipeline of diffusers holds a scheduler, and `set_timesteps` makes a new tensor at the start of every run. So the
tensor's identity is the generation's, and the scheduler's step index says which calls belong to one step. Both are read
from the object whose `__call__` is on the stack: nothing is registered or patched, and two pipelines that share a
transformer, in one thread or in several, are told apart.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch


class SchedulerRun(NamedTuple):
    """Where a pipeline stands in its denoising loop.

    Attributes:
        timesteps: The tensor that the scheduler holds during one run of the pipeline.
        step_index: How many steps the scheduler has taken; None where it does not count, or before its first step.
    """

    timesteps: weakref.ref[torch.Tensor]
    step_index: int | None

    def is_same_run(self, other: SchedulerRun | None) -> bool:
        """Whether both are of one run of one pipeline."""
        mine = self.timesteps()
        return other is not None and mine is not None and other.timesteps() is mine


_PACKAGE = __name__.partition(".")[0] + "."


def find_scheduler_run() -> SchedulerRun | None:
    """Where the innermost pipeline on the stack stands; None outside of one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # The package's own calls are on every stack, and to read a frame's locals makes a dictionary of them.
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
    index = getattr(scheduler, "_step_index", None)
    return SchedulerRun(weakref.ref(timesteps), index if isinstance(index, int) else None)
