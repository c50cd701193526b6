"""Compares the default configuration with the model's best at the same cost, from the rows of the quality benchmark."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.figures import Rows
from benchmarks.quality_frontier import Row, psnr_at

DEFAULT = "F1B0 r0.2 w≤8, FoCa"  # `cachedit_fx.config.RECOMMENDED`.
_LIKE_IT = r"^F1B0 r\S+ w(4|≤?8), FoCa$"  # The same with other thresholds and warm-ups.


def default_table(ours: Sequence[Row]) -> Rows:
    """Returns how many dB the default, also with other thresholds and warm-ups, is below the frontier at its share."""
    plain = [row for row in ours if row["group"] != "tuned"]
    has_tuned = len(plain) < len(ours)
    table = [
        ["configuration", "FLOPs", "PSNR, dB", "below the best", *["below the best, tuned ones included"] * has_tuned]
    ]
    for row in plain:
        if re.search(_LIKE_IT, row["name"]):
            gaps = [_gap(row, rows) for rows in ([plain, ours] if has_tuned else [plain])]
            name = f"{row['name']} (default)" if row["name"] == DEFAULT else row["name"]
            table.append([name, f"{row['share']:.3f}", f"{row['psnr']:.1f}", *gaps])
    return table


def _gap(row: Row, rows: Sequence[Row]) -> str:
    # Its variants, whose names begin with its own, may differ from it in nothing.
    best = psnr_at([other for other in rows if not other["name"].startswith(row["name"])], row["share"])
    return "-" if best is None else f"{max(best - row['psnr'], 0):.1f}"
