"""Compares guidance reuse with the cache alone, from the rows of the quality benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.figures import Rows
from benchmarks.quality_frontier import TARGETS, Reach, Row, reach


def guidance_table(ours: Sequence[Row], peer: Sequence[Row]) -> Rows:
    """Returns the lowest share of FLOPs at each quality, with each kind of guidance reuse and without it.

    In parentheses are its ratios to the share without guidance reuse, and to that of cache-dit, if these were measured.
    The first row is that of all configurations without guidance reuse, the second one that of those whose schedules
    were measured with guidance reuse too.
    """
    plain = [row for row in ours if not row["guidance"]]
    schedules = {(row["schedule"], row["group"]) for row in ours if row["guidance"] and row["schedule"]}
    kinds: Mapping[str, list[Row]] = {
        "off, all configurations": plain,
        "off, these configurations": [row for row in plain if (row["schedule"], row["group"]) in schedules],
        **{
            kind: [row for row in ours if row["guidance"] == kind]
            for kind in dict.fromkeys(row["guidance"] for row in ours if row["guidance"])
        },
    }
    table = [["second guidance branch", *(f"{target:g} dB" for target in TARGETS)]]
    for kind, rows in kinds.items():
        cells = [_cell(reach(rows, t), reach(plain, t), reach(peer, t)) for t in TARGETS]
        table.append([kind, *cells])
    return table


def _cell(found: Reach | None, plain: Reach | None, peer: Reach | None) -> str:
    if found is None:
        return "-"
    ratios = [f"{found.share / other.share:.2f}" if other else "-" for other in (plain, peer)]
    return f"{'≤ ' * found.is_bound}{found.share:.3f} ({', '.join(ratios)})"
