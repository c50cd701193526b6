"""Converts recorded runs to scheduling problems: the positions of the steps, and the weight of each output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.tuning.recording import Trajectory
from cachedit_fx.tuning.schedule import Problem
from cachedit_fx.tuning.simulate import position


@dataclass(frozen=True)
class RecordedRun:
    """The trajectory of one generation, or of one guidance branch of it.

    Attributes:
        trajectory: The outputs, as inner products.
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


def problems_of(recorded: Sequence[RecordedRun], by: str, starts: tuple[int, ...] = (0,)) -> list[Problem]:
    """Returns one problem for each distinct sequence of positions and weights.

    Its Gram matrix is the mean over the runs with this sequence.

    Args:
        recorded: The recorded runs.
        by: What the positions are, "step" or "timestep" (see `Forecaster.by`).
        starts: The first step of each transformer that a generation runs.
    """
    groups: dict[tuple[Any, ...], list[Problem]] = {}
    for each in recorded:
        gram, weights, moments = each.trajectory.gram, each.weights, each.trajectory.timesteps
        joint = each.trajectory.joint
        where = tuple(
            position(by, step, moments[step] if moments else None, moments[0] if moments else None)
            for step in range(len(weights))
        )
        scale = _scale(gram, weights)
        # Factors are fitted to the outputs before guidance. Those that fit best after guidance are larger, because it
        # multiplies the difference of the branches, and they amplify errors of earlier steps.
        fit = [branch / _scale(branch, weights) for branch in each.trajectory.branches] or [gram / scale]
        groups.setdefault((where, tuple(weights)), []).append(
            Problem(
                *(gram / scale, weights, where),
                starts=starts,
                joint=None if joint is None else joint / scale,
                fit_gram=np.mean(fit, axis=0),
            )
        )
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Problem]) -> Problem:
    joint = [problem.joint for problem in group if problem.joint is not None]
    return replace(
        group[0],
        gram=np.mean([problem.gram for problem in group], axis=0),
        joint=np.mean(joint, axis=0) if len(joint) == len(group) else None,
        fit_gram=np.mean([problem.fit_gram for problem in group if problem.fit_gram is not None], axis=0),
    )


def _scale(gram: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(weights @ gram @ weights) or 1.0
