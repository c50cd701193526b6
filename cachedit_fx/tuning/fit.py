"""Fits the factors of a forecast by least squares to the inner products of recorded outputs.

The forecast of a reused step is the sum of earlier computed outputs that is closest to its recorded output. With the
inner products of the outputs, this is a linear system with one equation per value in the sum, whatever their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.tuning.schedule import Problem, Schedule

# Relative to the mean square. Outputs of neighboring steps are nearly equal; the ridge keeps the factors small.
_RIDGE = 1e-7


@dataclass(frozen=True, kw_only=True)
class Fitting(LinearForecaster):
    """A forecaster that fits its factors to any set of computed steps, which a search over schedules needs.

    Attributes:
        memory: The largest number of values in a sum.
        gram: Inner products of the outputs of the S steps, averaged over the recorded runs, float64 [S, S].
    """

    memory: int = 3
    gram: NDArray[np.float64] = field(repr=False, compare=False)
    _solved: dict[tuple[tuple[int, ...], int], list[float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def depth(self) -> int:
        return self.memory

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        computed, step = tuple(round(position) for position in times.computed), round(times.now)
        if (computed, step) not in self._solved:
            self._solved[computed, step] = self._solve(computed, step)
        return self._solved[computed, step]

    def _solve(self, computed: tuple[int, ...], step: int) -> list[float]:
        if step >= len(self.gram):
            return [1.0, *[0.0] * (len(computed) - 1)]
        among = self.gram[np.ix_(computed, computed)]
        ridge = _RIDGE * np.trace(among) / len(computed) * np.eye(len(computed))
        newest = np.eye(len(computed))[0]  # The ridge pulls the factors towards those of the last value.
        toward = self.gram[list(computed), step] + ridge @ newest
        factors: list[float] = np.linalg.solve(among + ridge, toward).tolist()
        return factors

    def fixed(self, schedule: Schedule) -> FittedCalibratorConfig:
        """Returns a forecaster with the factors for one schedule, which needs no recorded run."""
        rows = []
        for step in range(schedule.num_steps):
            before = [number for number in schedule.computed if number < step][::-1][: self.memory]
            rows.append(tuple(self._solve(tuple(before), step)) if before else ())
        return FittedCalibratorConfig(memory=self.memory, computed=schedule.computed, factors=tuple(rows))


def fitting(forecaster: LinearForecaster, problems: Sequence[Problem]) -> LinearForecaster:
    """Returns the forecaster itself, or a `Fitting` for a fitted forecaster that has no factors yet.

    Args:
        forecaster: The forecaster to search with.
        problems: The problems of the recorded runs, with step numbers as positions.
    """
    if not isinstance(forecaster, FittedCalibratorConfig) or forecaster.factors:
        return forecaster
    return Fitting(memory=forecaster.memory, gram=np.mean([problem.gram for problem in problems], axis=0))
