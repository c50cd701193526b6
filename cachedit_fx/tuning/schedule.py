"""Which steps to compute: the best choice for every number of them, by a dynamic programme over recorded outputs.

A reused step returns a sum of earlier outputs with factors that the positions alone tell. What the latents miss at the
end is about

    sum over reused steps k of weight[k] * (forecast[k] - output[k])

where the weights are the scheduler's steps. Inside a gap between two computed steps errors add as vectors and may
cancel; gaps are taken to be independent, and their squares add, each times a gain: what is missed early the later steps
mend in part, or make worse. Every gap's square is then a quadratic form of the Gram matrix, and depends on the last few
computed steps alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times

NUM_FIRST = 1  # Steps that are always computed: before them there is nothing to forecast from.
_MAX_STATES = 15_000  # Of the dynamic programme, about; longer gaps are left out beyond.

State = tuple[int, ...]  # The last computed steps, newest first.


@dataclass(frozen=True)
class Problem:
    """One generation, or the mean of several with the same timesteps.

    Attributes:
        gram: Inner products of the outputs, float64 [S, S].
        weights: How far the scheduler goes with the output of each step, float64 [S].
        positions: Of each step, for `Times`.
        gains: Per step, what becomes at the end of the square of an error made there, float64 [S]; None for 1.
    """

    gram: NDArray[np.float64]
    weights: NDArray[np.float64]
    positions: tuple[float, ...]
    gains: NDArray[np.float64] | None = None

    @property
    def num_steps(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class Schedule:
    """Steps to compute, and the forecaster for all others.

    Attributes:
        cost: Squared error of the latents as the model of the errors has it, relative to the way they go in all.
    """

    forecaster: LinearForecaster
    computed: tuple[int, ...]
    num_steps: int
    cost: float = field(default=0.0, compare=False)

    @property
    def mask(self) -> tuple[int, ...]:
        return tuple(int(step in self.computed) for step in range(self.num_steps))

    @property
    def share_computed(self) -> float:
        return len(self.computed) / self.num_steps

    @property
    def key(self) -> str:
        """Equal for equal schedules: what is measured is stored under it."""
        return f"{self.forecaster!r} {''.join(map(str, self.mask))}"


def gap_costs(problem: Problem, forecaster: LinearForecaster, state: State, length: int) -> NDArray[np.float64]:
    """Squares of what the gap behind `state` adds to the error if 0, 1, ... `length` steps are reused, [length + 1]."""
    newest, where = state[0], problem.positions
    missed = np.zeros((length + 1, problem.num_steps))
    computed = tuple(where[step] for step in state)
    for i in range(1, length + 1):
        step = newest + i
        times = Times(computed, where[step], where[newest + 1 : step])
        missed[i] = missed[i - 1]
        missed[i, list(state)] += problem.weights[step] * np.asarray(forecaster.numbers(times))
        missed[i, step] -= problem.weights[step]
    costs: NDArray[np.float64] = np.maximum(np.einsum("is,is->i", missed @ problem.gram, missed), 0.0)
    if problem.gains is None:
        return costs
    middles = newest + (np.arange(length + 1) + 1) / 2
    costs *= np.interp(middles, np.arange(problem.num_steps), problem.gains)
    return costs


def cost_of(problems: Sequence[Problem], forecaster: LinearForecaster, computed: Sequence[int]) -> float:
    """The modelled square of the latents' error, with these steps computed: the mean over the problems."""
    ends = [*computed[1:], problems[0].num_steps]
    total = 0.0
    for index, (step, end) in enumerate(zip(computed, ends, strict=True)):
        state = tuple(reversed(computed[: index + 1]))[: forecaster.depth]
        if end > step + 1:
            total += sum(gap_costs(p, forecaster, state, end - step - 1)[-1] / _scale(p) for p in problems)
    assert step < problems[0].num_steps
    return total / len(problems)


def best_schedules(problems: Sequence[Problem], forecaster: LinearForecaster) -> dict[int, Schedule]:
    """For every number of computed steps, below all of them, the schedule with the smallest cost."""
    num_steps, first = problems[0].num_steps, tuple(reversed(range(min(NUM_FIRST, problems[0].num_steps))))
    scales = [_scale(problem) * len(problems) for problem in problems]
    longest = _longest_gap(num_steps, forecaster.depth)
    start = first[: forecaster.depth]
    best = {start: np.full(num_steps + 1, np.inf)}  # Per state and number of computed steps.
    best[start][len(first)] = 0.0
    came: dict[State, list[State | None]] = {start: [None] * (num_steps + 1)}
    ended = np.full(num_steps + 1, np.inf)
    last: list[State] = [start] * (num_steps + 1)
    waiting: list[list[State]] = [[] for _ in range(num_steps)]
    waiting[first[0]].append(start)
    for newest in range(first[0], num_steps):
        for state in waiting[newest]:
            length = min(longest, num_steps - 1 - newest)
            parts = (gap_costs(p, forecaster, state, length) / s for p, s in zip(problems, scales, strict=True))
            costs = sum(parts, np.zeros(length + 1))
            for reused, cost in enumerate(costs):
                after = newest + reused + 1
                if after == num_steps:
                    _keep_better(ended, last, best[state] + cost, state)
                    continue
                reached = (after, *state)[: forecaster.depth]
                if reached not in best:
                    best[reached], came[reached] = np.full(num_steps + 1, np.inf), [None] * (num_steps + 1)
                    waiting[after].append(reached)
                moved = np.concatenate(([np.inf], best[state][:-1] + cost))
                _keep_better(best[reached], came[reached], moved, state)
    return {
        count: Schedule(forecaster, _way(came, last[count], count), num_steps, float(ended[count]))
        for count in range(len(first), num_steps)
        if np.isfinite(ended[count])
    }


def _keep_better(best: NDArray[np.float64], origin: list, costs: NDArray[np.float64], state: State) -> None:  # type: ignore[type-arg]
    for count in np.nonzero(costs < best)[0]:
        best[count], origin[count] = costs[count], state


def _way(came: dict[State, list[State | None]], state: State | None, count: int) -> tuple[int, ...]:
    """The computed steps on the way to a state, in order."""
    steps: list[int] = []
    while state is not None:
        steps.append(state[0])
        state, count = came[state][count], count - 1
    return tuple(sorted({*steps, *range(min(NUM_FIRST, steps[-1] + 1))}))


def _longest_gap(num_steps: int, depth: int) -> int:
    if depth == 1:
        return num_steps
    return max(2, min(num_steps, int((_MAX_STATES / num_steps) ** (1 / (depth - 1)))))


def _scale(problem: Problem) -> float:
    """Square of the way that the latents go in all; where that is nothing, as it is."""
    return float(problem.weights @ problem.gram @ problem.weights) or 1.0
