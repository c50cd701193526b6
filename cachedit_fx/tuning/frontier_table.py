"""The table of what `tune` measured, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from cachedit_fx.tuning.points import Alternative, Point

_MOST_ROWS = 12  # Of either kind; those nearest to the choice in speed.

Row = TypeVar("Row", Point, Alternative)


def frontier_lines(
    frontier: Sequence[Point], alternatives: Sequence[Alternative], chosen: Point | Alternative | None, speedup: float
) -> Iterator[str]:
    """Yields the lines of a table: the measured points and the alternatives, fastest first; `*` marks the choice.

    Args:
        frontier: The configurations of the cache; only those that were measured are shown.
        alternatives: The alternatives.
        chosen: The choice.
        speedup: The speed-up of the choice. If there are many rows, those that are near to it are shown.
    """
    cached = [point for point in frontier if point.is_measured]
    rows: list[Point | Alternative] = [*_nearest(cached, speedup), *_nearest(alternatives, speedup)]
    yield ""
    yield "   speed-up  PSNR (dB)  relative L2  target   configuration"
    for row in sorted(rows, key=lambda row: (-row.quality.speedup, -row.quality.psnr)):
        found = row.quality
        mark = "*" if row is chosen else " "
        target = "reached" if row.is_reached else ""
        yield f" {mark} {found.speedup:>8.2f}  {found.psnr:>9.1f}  {found.rel_l2:>11.3g}  {target:<7}  {row.name}"
    yield ""


def _nearest(rows: Sequence[Row], speedup: float) -> list[Row]:
    return sorted(rows, key=lambda row: abs(row.quality.speedup - speedup))[:_MOST_ROWS]
