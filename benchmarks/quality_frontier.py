"""Computes the frontiers of the families: the lowest cost of each quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TARGETS = (45.0, 40.0, 35.0)  # dB.
NEAR = 1.1  # Groups whose share at a target is up to this many times the least are timed too.

Row = Mapping[str, Any]  # What a worker answered for a configuration that ran.


@dataclass(frozen=True)
class Reach:
    """A point on a frontier, between two configurations, that reaches a quality.

    Attributes:
        low: The row below the target. If the cheapest row is better than the target, `low` and `high` are that row.
        high: The row above the target.
        weight: The weight of `high`, from 0 to 1.
    """

    low: Row
    high: Row
    weight: float

    @property
    def is_bound(self) -> bool:
        """Whether configurations that were not tried might reach the quality at a lower cost."""
        return self.low is self.high

    @property
    def share(self) -> float:
        return self._between("share")

    def time(self, times: Mapping[str, Row], clock: str) -> float | None:
        """The ratio to the uncached time; None if one of the two configurations was not timed."""
        if self.low["name"] not in times or self.high["name"] not in times:
            return None
        low, high = (float(times[row["name"]][clock]) for row in (self.low, self.high))
        return low + self.weight * (high - low)

    def _between(self, key: str) -> float:
        return float(self.low[key] + self.weight * (self.high[key] - self.low[key]))


def frontier(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows that no other row beats (with at most the cost and at least the PSNR), cheapest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["share"], -row["psnr"])):
        if row["share"] < 1 and (not found or row["psnr"] > found[-1]["psnr"]):
            found.append(row)
    return found


def reach(rows: Sequence[Row], psnr: float) -> Reach | None:
    """Returns where a frontier, linear between its rows, reaches this PSNR; None if it does not reach it."""
    line = frontier(rows)
    for low, high in zip([None, *line], line, strict=False):
        if high["psnr"] >= psnr:
            if low is None:
                return Reach(high, high, 0.0)
            return Reach(low, high, (psnr - low["psnr"]) / (high["psnr"] - low["psnr"]))
    return None


def psnr_at(rows: Sequence[Row], share: float) -> float | None:
    """Returns the highest PSNR at this share on the lines between any two rows; None below the cheapest row."""
    line = frontier(rows)
    below, above = ([row for row in line if (row["share"] > share) is is_above] for is_above in (False, True))
    found = [float(row["psnr"]) for row in below]
    for low in below:
        for high in above:
            weight = (share - low["share"]) / (high["share"] - low["share"])
            found.append(float(low["psnr"] + weight * (high["psnr"] - low["psnr"])))
    return max(found, default=None)


def reaches(rows: Sequence[Row], psnr: float) -> list[Reach]:
    """Returns the point that all rows reach, followed by those of single groups whose cost is close to it."""
    best = reach(rows, psnr)
    if best is None:
        return []
    groups = dict.fromkeys(row["group"] for row in rows)
    alone = [reach([row for row in rows if row["group"] == group], psnr) for group in groups]
    return [best, *(each for each in alone if each is not None and each.share <= NEAR * best.share)]


def worth_timing(rows: Sequence[Row], targets: Sequence[float] = TARGETS) -> list[str]:
    """Returns the names of the configurations next to the targets."""
    found = [each for target in targets for each in reaches(rows, target)]
    return list(dict.fromkeys(row["name"] for each in found for row in (each.low, each.high)))


def least_time(rows: Sequence[Row], times: Mapping[str, Row], psnr: float, clock: str) -> float | None:
    """Returns the smallest time ratio of a timed configuration that reaches this PSNR."""
    found = [each.time(times, clock) for each in reaches(rows, psnr)]
    return min((value for value in found if value is not None), default=None)
