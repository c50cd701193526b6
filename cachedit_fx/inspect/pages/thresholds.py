"""What another threshold would have done, from what a run in shadow mode measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cachedit_fx.runtime.stats import CacheStats


@dataclass(frozen=True, slots=True)
class Measured:
    """A step whose diff and whose error are both known.

    Attributes:
        error: Of the model's output, relative L2.
        is_reused: Whether the present policy reuses it.
    """

    step: int
    diff: float
    error: float
    is_reused: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A threshold that could be chosen.

    Attributes:
        threshold: Just above a diff that was seen.
        below: Steps whose diff is below it,
        more: of these, how many the present policy does not reuse.
        error: The largest of the outputs' errors among the steps below.
        is_present: No step lies between it and the threshold that the policy has now.
    """

    threshold: float
    below: int
    more: int
    error: float
    is_present: bool


def measured(entry: CacheStats) -> list[Measured]:
    """Steps with a finite diff and a known error, in the order of their diffs; none where sums decide."""
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
    """A candidate for every diff that was seen, smallest first."""
    steps = measured(entry)
    present = max(entry.thresholds.values(), default=math.nan)
    diffs = sorted({above(one.diff) for one in steps})
    found = []
    for number, threshold in enumerate(diffs):
        below = [one for one in steps if one.diff < threshold]
        following = diffs[number + 1] if number + 1 < len(diffs) else math.inf
        more = sum(not one.is_reused for one in below)
        worst = max(one.error for one in below)
        found.append(Candidate(threshold, len(below), more, worst, threshold <= present < following))
    return found


def above(diff: float) -> float:
    """The next larger number of three significant digits."""
    if diff <= 0:
        return 1e-6
    unit = 10.0 ** (math.floor(math.log10(diff)) - 2)
    units = math.floor(diff / unit)
    rounded = (float(f"{(units + more) * unit:.3g}") for more in (1, 2))  # The first, but for an error of rounding.
    return next(value for value in rounded if value > diff)
