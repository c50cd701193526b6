"""Compares forecasters at equal decisions, from the rows of the quality benchmark.

Rows of one schedule compute the same steps, as far as a schedule does not depend on the forecast: masks whose computed
steps are evenly spaced, once with a forecast of what the blocks add and once with a forecast of the model's output, and
thresholds after four or eight warm-up steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.figures import Rows
from benchmarks.quality_configs import FORECASTERS
from benchmarks.quality_frontier import TARGETS, Row, reach

SCHEDULES = {
    "A forecast of what the blocks add": r"^blocks \d+ even$",
    "A forecast of the model's output": r"^output \d+ even$",
    "A threshold after warm-up": r"^F1B0 r\S+ w[48]$",
}
_LEAST = 3  # Forecasters that a schedule must have been measured with.


def forecaster_tables(rows: Sequence[Row]) -> dict[str, Rows]:
    """Returns a table of the PSNR of every forecaster and schedule, in dB, for each kind of schedule.

    The columns are sorted by the FLOPs. The highest PSNR of each is bold.
    """
    rows = [row for row in rows if not row["guidance"] and row["schedule"]]
    tables = {
        title: _table([row for row in rows if re.search(kind, row["schedule"])]) for title, kind in SCHEDULES.items()
    }
    return {title: table for title, table in tables.items() if len(table) > 2}


def cost_table(rows: Sequence[Row]) -> Rows:
    """Returns the lowest share of FLOPs with which each forecaster alone reaches each quality."""
    rows = [row for row in rows if not row["guidance"] and row["schedule"]]
    table = [["forecaster", *(f"{target:g} dB" for target in TARGETS)]]
    for group in [group for group in FORECASTERS if any(row["group"] == group for row in rows)]:
        found = [reach([row for row in rows if row["group"] == group], target) for target in TARGETS]
        table.append([group, *(f"{'≤ ' * at.is_bound}{at.share:.3f}" if at else "-" for at in found)])
    return table


def _table(rows: Sequence[Row]) -> Rows:
    psnr = {(row["group"], row["schedule"]): row["psnr"] for row in rows}
    shares: dict[str, float] = {}
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        found = [row["share"] for row in rows if row["schedule"] == schedule]
        if len(found) >= _LEAST and min(found) < 1:
            shares[schedule] = min(found)
    schedules = sorted(shares, key=lambda name: shares[name])
    best = {name: max(value for (_, other), value in psnr.items() if other == name) for name in schedules}
    groups = [group for group in FORECASTERS if any((group, name) in psnr for name in schedules)]

    def cell(group: str, name: str) -> str:
        value = psnr.get((group, name))
        return "-" if value is None else f"**{value:.1f}**" if value == best[name] else f"{value:.1f}"

    return [
        ["forecaster", *(re.sub("^(blocks|output) | even$|^F1B0 ", "", name) for name in schedules)],
        ["FLOPs", *(f"{shares[name]:.3f}" for name in schedules)],
        *([group, *(cell(group, name) for name in schedules)] for group in groups),
    ]
