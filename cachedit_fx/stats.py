"""What a session did, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_PERCENTILES = (0, 25, 50, 75, 95, 100)
_HEADER = ("Cache Steps", "Diffs Min", "Diffs P25", "Diffs P50", "Diffs P75", "Diffs P95", "Diffs Max")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One region of one session.

    Attributes:
        region: Its blocks, as in `transformer_blocks[1:]`.
        session: The request's name, if it has one, and the number of its conditioning.
        num_steps: Steps so far.
        cached_steps: Numbers of the steps that were reused, from 0.
        residual_diffs: Step -> relative L1 distance, dimensionless; only steps whose decision looked at it.
        decisions: Per step the reason: "warmup", "diff-below", "diff-above", ... (see `policy.decide`).
        state_bytes: What the session holds now; 0 once it is finished.
        peak_state_bytes: What it held at its last step.
    """

    region: str
    session: str
    num_steps: int
    cached_steps: list[int] = field(default_factory=list)
    residual_diffs: dict[int, float] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    state_bytes: int = 0
    peak_state_bytes: int = 0

    def __str__(self) -> str:
        return _table([self])


class Summary(list[CacheStats]):
    """A list of statistics that prints as one table, a line each."""

    def __str__(self) -> str:
        return _table(self) if self else "no session has run yet"


def _table(stats: list[CacheStats]) -> str:
    rows: list[tuple[str, ...]] = [(*_HEADER, "Steps", "Region", "Session")]
    for entry in stats:
        diffs = [d for d in entry.residual_diffs.values() if np.isfinite(d)]
        marks = [f"{q:.3f}" for q in np.percentile(diffs, _PERCENTILES)] if diffs else ["-"] * len(_PERCENTILES)
        rows.append((str(len(entry.cached_steps)), *marks, str(entry.num_steps), entry.region, entry.session))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
