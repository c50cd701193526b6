"""From recorded generations to problems for the schedule: where steps stand, and what the scheduler makes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.tuning.recording import Trajectory
from cachedit_fx.tuning.schedule import Problem
from cachedit_fx.tuning.simulate import position


@dataclass(frozen=True)
class RecordedRun:
    """A guidance branch's trajectory with the weights of its steps, float64 [S]."""

    trajectory: Trajectory
    weights: NDArray[np.float64]


def weights_of(scheduler: Any, timesteps: Sequence[float] | None, num_steps: int) -> NDArray[np.float64]:
    """How far the scheduler goes with each output: by its sigmas, else by the timesteps, else everywhere the same.

    Only their ratios count.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        # A call that begins in the middle (image to image) takes the last of them.
        known = np.asarray([float(sigma) for sigma in sigmas], dtype=np.float64)[-(num_steps + 1) :]
        if len(known) == num_steps + 1 and np.isfinite(known).all() and np.ptp(known):
            return np.diff(known)
    if timesteps is not None and len(timesteps) > 1 and np.ptp(timesteps):
        return np.diff(np.asarray([*timesteps, 0.0], dtype=np.float64))
    return np.ones(num_steps)


def problems_of(recorded: Sequence[RecordedRun], by: str) -> list[Problem]:
    """One problem per course of the timesteps, each with the mean of its generations."""
    groups: dict[tuple[Any, ...], list[Problem]] = {}
    for each in recorded:
        gram, weights, moments = each.trajectory.gram, each.weights, each.trajectory.timesteps
        where = tuple(
            position(by, step, moments[step] if moments else None, moments[0] if moments else None)
            for step in range(len(weights))
        )
        scale = float(weights @ gram @ weights) or 1.0
        groups.setdefault((where, tuple(weights)), []).append(Problem(gram / scale, weights, where))
    return [
        Problem(np.mean([problem.gram for problem in group], axis=0), group[0].weights, group[0].positions)
        for group in groups.values()
    ]
