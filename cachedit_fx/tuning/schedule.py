"""Finds the best steps to compute, for every number of computed steps, by dynamic programming over recorded outputs.

A reused step returns a sum of earlier outputs, with factors that follow from the positions. The error of the latents at
the end is approximately

    sum over reused steps k of weight[k] * (forecast[k] - output[k])

where the weights are the lengths of the scheduler's steps. Within a gap between two computed steps, errors add as
vectors and may cancel. Different gaps are assumed to be independent: their squared errors add, each multiplied by a
gain, because later steps may reduce or amplify an earlier error. The squared error of a gap is then a quadratic form of
the Gram matrix that depends only on the last few computed steps.

If a pipeline runs several transformers one after the other, a forecast never uses outputs of another transformer: each
computes its first step, and its history begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times

NUM_FIRST = 1  # Number of first steps that are always computed, because nothing can be forecast before them.
_MAX_STATES = 15_000  # Approximate number of states of the dynamic program; it limits the length of gaps.

State = tuple[int, ...]  # The last computed steps, newest first.


@dataclass(frozen=True)
class Problem:
    """One generation of S steps, or the mean of several with the same timesteps.

    Attributes:
        gram: Inner products of the outputs, float64 [S, S].
        weights: The length of the scheduler's step for each output, float64 [S].
        positions: The position of each step, as in `Times`.
        gains: For each step, the factor from the squared error there to the squared error at the end, float64 [S];
            None for 1.
        starts: The first step of each transformer that the generation runs.
        joint: Inner products of the outputs, and of what the difference of two guidance branches adds to each of them,
            float64 [2 S, 2 S]; None if there are not two.
        fit_gram: Inner products of the outputs that factors are fitted to, float64 [S, S]; None for `gram`.
    """

    gram: NDArray[np.float64]
    weights: NDArray[np.float64]
    positions: tuple[float, ...]
    gains: NDArray[np.float64] | None = None
    starts: tuple[int, ...] = (0,)
    joint: NDArray[np.float64] | None = None
    fit_gram: NDArray[np.float64] | None = None

    @property
    def num_steps(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class Schedule:
    """The steps to compute, and the forecaster for all others.

    Attributes:
        forecaster: The forecaster of the reused steps.
        computed: The numbers of the computed steps, in ascending order.
        num_steps: The number of steps of a generation.
        cost: The predicted squared error of the latents, relative to the square of their total change.
        starts: The first step of each transformer that the generation runs.
        guided: The computed steps at which the second guidance branch does not compute, but uses the difference from
            the first one (`guidance_reuse`).
    """

    forecaster: LinearForecaster
    computed: tuple[int, ...]
    num_steps: int
    cost: float = field(default=0.0, compare=False)
    starts: tuple[int, ...] = (0,)
    guided: tuple[int, ...] = ()

    @property
    def mask(self) -> tuple[int, ...]:
        return tuple(int(step in self.computed) for step in range(self.num_steps))

    @property
    def share_computed(self) -> float:
        """The share of the calls of the model that compute. A guided step saves one of two calls."""
        return (len(self.computed) - len(self.guided) / 2) / self.num_steps

    @property
    def key(self) -> str:
        """The key under which measurements are stored; equal for equal schedules."""
        guided = f" guided {self.guided}" if self.guided else ""
        return f"{self.forecaster!r} {''.join(map(str, self.mask))}{guided}"


def gap_costs(problem: Problem, forecaster: LinearForecaster, state: State, length: int) -> NDArray[np.float64]:
    """Returns the squared error of the gap after `state` if 0, 1, ... `length` steps are reused, float64 [length + 1].

    Args:
        problem: The problem.
        forecaster: The forecaster of the reused steps.
        state: The last computed steps before the gap, newest first.
        length: The largest number of reused steps.
    """
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
    """Returns the predicted relative squared error of the latents with these computed steps, averaged over problems."""
    num_steps, starts = problems[0].num_steps, problems[0].starts
    ends = [*computed[1:], num_steps]
    total = 0.0
    for index, (step, end) in enumerate(zip(computed, ends, strict=True)):
        state = history_of(computed[: index + 1], starts)[: forecaster.depth]
        if end > step + 1:
            total += sum(gap_costs(p, forecaster, state, end - step - 1)[-1] / scale_of(p) for p in problems)
    assert step < num_steps
    return total / len(problems)


def history_of(computed: Sequence[int], starts: Sequence[int]) -> State:
    """Returns the computed steps of the transformer that computed the last one, newest first."""
    start = max(start for start in starts if start <= computed[-1])
    return tuple(step for step in reversed(computed) if step >= start)


def best_schedules(problems: Sequence[Problem], forecaster: LinearForecaster) -> dict[int, Schedule]:
    """Returns the schedule with the smallest cost for every number of computed steps less than the number of steps."""
    num_steps, first = problems[0].num_steps, tuple(reversed(range(min(NUM_FIRST, problems[0].num_steps))))
    scales = [scale_of(problem) * len(problems) for problem in problems]
    longest, starts = _longest_gap(num_steps, forecaster.depth), problems[0].starts
    end_of = [min(start for start in (*starts, num_steps) if start > step) for step in range(num_steps)]
    start = first[: forecaster.depth]
    best = {start: np.full(num_steps + 1, np.inf)}  # The smallest cost by state and number of computed steps.
    best[start][len(first)] = 0.0
    came: dict[State, list[State | None]] = {start: [None] * (num_steps + 1)}
    ended = np.full(num_steps + 1, np.inf)
    last: list[State] = [start] * (num_steps + 1)
    waiting: list[list[State]] = [[] for _ in range(num_steps)]
    waiting[first[0]].append(start)
    for newest in range(first[0], num_steps):
        for state in waiting[newest]:
            length = min(longest, end_of[newest] - 1 - newest)
            parts = (gap_costs(p, forecaster, state, length) / s for p, s in zip(problems, scales, strict=True))
            costs = sum(parts, np.zeros(length + 1))
            for reused, cost in enumerate(costs):
                after = newest + reused + 1
                if after == num_steps:
                    _keep_better(ended, last, best[state] + cost, state)
                    continue
                reached = (after,) if after in starts else (after, *state)[: forecaster.depth]
                if reached not in best:
                    best[reached], came[reached] = np.full(num_steps + 1, np.inf), [None] * (num_steps + 1)
                    waiting[after].append(reached)
                moved = np.concatenate(([np.inf], best[state][:-1] + cost))
                _keep_better(best[reached], came[reached], moved, state)
    return {
        count: Schedule(forecaster, _path(came, last[count], count), num_steps, float(ended[count]), starts)
        for count in range(len(first), num_steps)
        if np.isfinite(ended[count])
    }


def _keep_better(best: NDArray[np.float64], origin: list, costs: NDArray[np.float64], state: State) -> None:  # type: ignore[type-arg]
    for count in np.nonzero(costs < best)[0]:
        best[count], origin[count] = costs[count], state


def _path(came: dict[State, list[State | None]], state: State | None, count: int) -> tuple[int, ...]:
    """Returns the computed steps on the path to a state, in ascending order."""
    steps: list[int] = []
    while state is not None:
        steps.append(state[0])
        state, count = came[state][count], count - 1
    return tuple(sorted({*steps, *range(min(NUM_FIRST, steps[-1] + 1))}))


def _longest_gap(num_steps: int, depth: int) -> int:
    if depth == 1:
        return num_steps
    return max(2, min(num_steps, int((_MAX_STATES / num_steps) ** (1 / (depth - 1)))))


def scale_of(problem: Problem) -> float:
    """Returns the square of the total change of the latents, or 1 if it is 0."""
    return float(problem.weights @ problem.gram @ problem.weights) or 1.0
