"""Decides at which computed steps the second of two guidance branches does not have to compute (`guidance_reuse`).

At such a step, the guided output consists of the output of the first branch and a forecast of what the difference of
the two adds to it. Its error is that of the forecast, and it remains in the value that later steps are forecast from.
Everything is linear in the outputs and the differences of the steps, so the squared error of a schedule follows from
their inner products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.tuning.fit import Fitting
from cachedit_fx.tuning.schedule import Problem, Schedule, history_of, scale_of


def guided_schedules(problems: Sequence[Problem], schedule: Schedule) -> Iterator[Schedule]:
    """Yields schedules with one guided step more each time, whichever has the smallest predicted error.

    Args:
        problems: The problems of the recorded runs; nothing is yielded if they have no joint Gram matrix.
        schedule: A schedule without guided steps.
    """
    if any(problem.joint is None for problem in problems):
        return
    while free := [step for step in schedule.computed if step not in (*schedule.starts, *schedule.guided)]:
        more = [replace(schedule, guided=tuple(sorted((*schedule.guided, step)))) for step in free]
        schedule = min((replace(each, cost=guided_cost(problems, each)) for each in more), key=lambda each: each.cost)
        yield schedule


def guided_cost(problems: Sequence[Problem], schedule: Schedule) -> float:
    """Returns the predicted relative squared error of the latents, averaged over problems, as `schedule.cost_of`."""
    return sum(_cost(problem, schedule) / scale_of(problem) for problem in problems) / len(problems)


def _cost(problem: Problem, schedule: Schedule) -> float:
    assert problem.joint is not None
    num_steps, weights, where = problem.num_steps, problem.weights, problem.positions
    exact = np.eye(2 * num_steps)  # A row is a combination of the outputs and the differences of all steps.
    values: dict[int, NDArray[np.float64]] = {}  # What the computed steps return.
    total = 0.0
    for index, (step, end) in enumerate(zip(schedule.computed, (*schedule.computed[1:], num_steps), strict=True)):
        values[step] = exact[step]
        computed = schedule.computed[: index + 1]
        if step in schedule.guided:
            both = history_of([each for each in computed if each not in schedule.guided], schedule.starts)
            factors = _factors(_of_differences(schedule.forecaster), problem, both, step)
            forecast = sum(f * exact[num_steps + each] for f, each in zip(factors, both, strict=False))
            values[step] = exact[step] + forecast - exact[num_steps + step]
        missed = weights[step] * (values[step] - exact[step])
        history = history_of(computed, schedule.starts)
        for reused in range(step + 1, end):
            factors = _factors(schedule.forecaster, problem, history, reused, range(step + 1, reused))
            forecast = sum(f * values[each] for f, each in zip(factors, history, strict=False))
            missed = missed + weights[reused] * (forecast - exact[reused])
        cost = max(0.0, float(missed @ problem.joint @ missed))
        middle = (step + end) / 2
        gain = 1.0 if problem.gains is None else float(np.interp(middle, np.arange(num_steps), problem.gains))
        total += gain * cost
    assert len(where) == num_steps
    return total


def _of_differences(forecaster: LinearForecaster) -> LinearForecaster:
    return forecaster.of_differences() if isinstance(forecaster, Fitting) else forecaster


def _factors(
    forecaster: LinearForecaster, problem: Problem, history: Sequence[int], step: int, reused: Sequence[int] = ()
) -> Sequence[float]:
    """Returns the factors of the newest values of a history."""
    where = problem.positions
    computed = tuple(where[each] for each in history[: forecaster.depth])
    return forecaster.numbers(Times(computed, where[step], tuple(where[each] for each in reused)))
