"""Converts recorded runs to scheduling problems: the positions of the steps, and the weight of each output."""

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
    """The trajectory of one guidance branch in one generation.

    Attributes:
        trajectory: The outputs of the model, as inner products.
        weights: The weight of each step (see `weights_of`), float64 [S].
    """

    trajectory: Trajectory
    weights: NDArray[np.float64]


def weights_of(scheduler: Any, timesteps: Sequence[float] | None, num_steps: int) -> NDArray[np.float64]:
    """Returns the length of the scheduler's step for each output, float64 [S].

    The lengths are differences of the scheduler's sigmas, or of the timesteps if it has none. Without either, all are
    equal. Only their ratios matter.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        # A call that begins in the middle of the schedule (image to image) uses the last ones.
        last = np.asarray([float(sigma) for sigma in sigmas], dtype=np.float64)[-(num_steps + 1) :]
        if len(last) == num_steps + 1 and np.isfinite(last).all() and np.ptp(last):
            return np.diff(last)
    if timesteps is not None and len(timesteps) > 1 and np.ptp(timesteps):
        return np.diff(np.asarray([*timesteps, 0.0], dtype=np.float64))
    return np.ones(num_steps)


def problems_of(recorded: Sequence[RecordedRun], by: str) -> list[Problem]:
    """Returns one problem for each distinct sequence of positions and weights.

    Its Gram matrix is the mean over the runs with this sequence.

    Args:
        recorded: The recorded runs.
        by: What the positions are, "step" or "timestep" (see `Forecaster.by`).
    """
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
