"""Evaluates other thresholds on the measurements of a run in shadow mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cachedit_fx.runtime.stats import CacheStats


@dataclass(frozen=True, slots=True)
class Measured:
    """A step whose diff and error are both known.

    Attributes:
        step: The number of the step.
        diff: Its residual diff, relative L1, dimensionless.
        error: The error of the output of the model if the step is reused, relative L2, dimensionless.
        is_reused: Whether the current policy reuses the step.
    """

    step: int
    diff: float
    error: float
    is_reused: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A threshold that could be chosen.

    Attributes:
        threshold: A value just above a measured diff, or the threshold of the run.
        below: The number of steps whose diff is below it.
        more: The number of these steps that the current policy does not reuse.
        error: The largest error of the output among these steps, relative L2; 0 if there are none.
        is_present: Whether it is the threshold of the run.
    """

    threshold: float
    below: int
    more: int
    error: float
    is_present: bool


def measured(entry: CacheStats) -> list[Measured]:
    """Returns the steps with a finite diff and a known error, sorted by their diffs; none if sums of diffs decide."""
    if entry.adds_up:
        return []
    reused = set(entry.cached_steps)
    found = [
        Measured(step, diff, entry.errors[step].output, step in reused)
        for step, diff in entry.residual_diffs.items()
        if step in entry.errors and math.isfinite(diff)
    ]
    return sorted(found, key=lambda one: one.diff)


def candidates(entry: CacheStats) -> list[Candidate]:
    """Returns a candidate for every measured diff and one for the threshold of the run, smallest first.

    The threshold of the run takes the place of a candidate with the same steps below it. If the threshold changed
    during the run, it is no candidate.
    """
    steps = measured(entry)
    given = set(entry.thresholds.values())
    present = given.pop() if len(given) == 1 and steps else None
    thresholds = {above(one.diff) for one in steps}
    if present is not None:
        num_below = sum(one.diff < present for one in steps)
        thresholds = {value for value in thresholds if sum(one.diff < value for one in steps) != num_below} | {present}
    found = []
    for threshold in sorted(thresholds):
        below = [one for one in steps if one.diff < threshold]
        more = sum(not one.is_reused for one in below)
        worst = max((one.error for one in below), default=0.0)
        found.append(Candidate(threshold, len(below), more, worst, threshold == present))
    return found


def above(diff: float) -> float:
    """Returns the next larger number with three significant digits."""
    if diff <= 0:
        return 1e-6
    unit = 10.0 ** (math.floor(math.log10(diff)) - 2)
    units = math.floor(diff / unit)
    rounded = (float(f"{(units + more) * unit:.3g}") for more in (1, 2))  # The second one only after a rounding error.
    return next(value for value in rounded if value > diff)
