"""Factors by least squares: which sum of the outputs that a schedule computes comes closest to one that it leaves out.

With the outputs' inner products that is a system of as many equations as values are remembered, whatever their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.tuning.schedule import Problem, Schedule

_RIDGE = 1e-7  # Of the mean square: outputs of neighbouring steps are nearly the same, and factors must stay small.


@dataclass(frozen=True, kw_only=True)
class Fitting(LinearForecaster):
    """A forecaster that fits its factors to whatever steps were computed: what a search over schedules needs.

    Attributes:
        memory: How many values are summed at the most.
        gram: Inner products of the outputs, mean over the recorded generations, float64 [S, S].
    """

    memory: int = 3
    gram: NDArray[np.float64] = field(repr=False, compare=False)
    _known: dict[tuple[tuple[int, ...], int], list[float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def depth(self) -> int:
        return self.memory

    def numbers(self, times: Times) -> Sequence[float]:
        """The factor of each computed value, newest first."""
        computed, step = tuple(round(position) for position in times.computed), round(times.now)
        if (computed, step) not in self._known:
            self._known[computed, step] = self._solve(computed, step)
        return self._known[computed, step]

    def _solve(self, computed: tuple[int, ...], step: int) -> list[float]:
        if step >= len(self.gram):
            return [1.0, *[0.0] * (len(computed) - 1)]
        among = self.gram[np.ix_(computed, computed)]
        ridge = _RIDGE * np.trace(among) / len(computed) * np.eye(len(computed))
        newest = np.eye(len(computed))[0]  # What the ridge draws towards: the last value as it is.
        toward = self.gram[list(computed), step] + ridge @ newest
        factors: list[float] = np.linalg.solve(among + ridge, toward).tolist()
        return factors

    def fixed(self, schedule: Schedule) -> FittedCalibratorConfig:
        """The factors for one schedule, as a forecaster that needs no recording."""
        rows = []
        for step in range(schedule.num_steps):
            before = [number for number in schedule.computed if number < step][::-1][: self.memory]
            rows.append(tuple(self._solve(tuple(before), step)) if before else ())
        return FittedCalibratorConfig(memory=self.memory, computed=schedule.computed, factors=tuple(rows))


def fitting(forecaster: LinearForecaster, problems: Sequence[Problem]) -> LinearForecaster:
    """What is searched with: the forecaster itself, or the fitting of one that has no factors yet.

    Args:
        problems: The recorded generations, with the positions of "step".
    """
    if not isinstance(forecaster, FittedCalibratorConfig) or forecaster.factors:
        return forecaster
    return Fitting(memory=forecaster.memory, gram=np.mean([problem.gram for problem in problems], axis=0))
