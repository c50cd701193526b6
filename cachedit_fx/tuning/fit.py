"""Fits the factors of a forecast by least squares to the inner products of recorded outputs.

The forecast of a reused step is the sum of earlier computed outputs that is closest to its recorded output. With the
inner products of the outputs, this is a linear system with one equation per value in the sum, whatever their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
        difference: The same of the differences of the guidance branches; None if they are not known.
    """

    memory: int = 3
    gram: NDArray[np.float64] = field(repr=False, compare=False)
    difference: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    _solved: dict[tuple[tuple[int, ...], int], list[float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def depth(self) -> int:
        return self.memory

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        computed, step = tuple(round(position) for position in times.computed), round(times.now)
        if (computed, step) not in self._solved:
            self._solved[computed, step] = _solve(self.gram, computed, step)
        return self._solved[computed, step]

    def of_differences(self) -> Fitting:
        """Returns the forecaster of the difference of the guidance branches."""
        assert self.difference is not None
        return replace(self, gram=self.difference, difference=None, _solved={})

    def fixed(self, schedule: Schedule) -> FittedCalibratorConfig:
        """Returns a forecaster with the factors for one schedule, which needs no recorded run."""
        rows = []
        for step in range(schedule.num_steps):
            is_guided = step in schedule.guided
            left_out = schedule.guided if is_guided else ()
            before = [n for n in schedule.computed if n < step and n not in left_out][::-1][: self.memory]
            gram = self.difference if is_guided and self.difference is not None else self.gram
            rows.append(tuple(_solve(gram, tuple(before), step)) if before else ())
        return FittedCalibratorConfig(
            memory=self.memory, computed=schedule.computed, factors=tuple(rows), guided=schedule.guided
        )

    def within(self, start: int, end: int) -> Fitting:
        """Returns a forecaster for the steps of one transformer, from `start` to before `end`, counted from 0."""
        difference = None if self.difference is None else self.difference[start:end, start:end]
        return Fitting(memory=self.memory, gram=self.gram[start:end, start:end], difference=difference)


def _solve(gram: NDArray[np.float64], computed: tuple[int, ...], step: int) -> list[float]:
    if step >= len(gram):
        return [1.0, *[0.0] * (len(computed) - 1)]
    among = gram[np.ix_(computed, computed)]
    ridge = _RIDGE * np.trace(among) / len(computed) * np.eye(len(computed))
    newest = np.eye(len(computed))[0]  # The ridge pulls the factors towards those of the last value.
    toward = gram[list(computed), step] + ridge @ newest
    factors: list[float] = np.linalg.solve(among + ridge, toward).tolist()
    return factors


def parts_of(schedule: Schedule) -> list[Schedule]:
    """Returns the schedule of each transformer, whose steps are counted from 0, with fixed forecasters."""
    found = []
    for start, end in itertools.pairwise((*schedule.starts, schedule.num_steps)):
        computed, guided = (
            tuple(step - start for step in steps if start <= step < end)
            for steps in (schedule.computed, schedule.guided)
        )
        part = Schedule(schedule.forecaster, computed, end - start, guided=guided)
        if isinstance(schedule.forecaster, Fitting):
            part = replace(part, forecaster=schedule.forecaster.within(start, end).fixed(part))
        found.append(part)
    return found


def fitting(forecaster: LinearForecaster, problems: Sequence[Problem]) -> LinearForecaster:
    """Returns the forecaster itself, or a `Fitting` for a fitted forecaster that has no factors yet.

    Args:
        forecaster: The forecaster to search with.
        problems: The problems of the recorded runs, with step numbers as positions.
    """
    if not isinstance(forecaster, FittedCalibratorConfig) or forecaster.factors:
        return forecaster
    gram = np.mean([p.gram if p.fit_gram is None else p.fit_gram for p in problems], axis=0)
    joint = [problem.joint for problem in problems if problem.joint is not None]
    num_steps = len(gram)
    difference = np.mean(joint, axis=0)[num_steps:, num_steps:] if len(joint) == len(problems) else None
    return Fitting(memory=forecaster.memory, gram=gram, difference=difference)
