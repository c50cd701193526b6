"""Plots the results of the quality benchmark: PSNR over the share of FLOPs, with a panel for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_frontier import TARGETS, frontier
from benchmarks.quality_metrics import MOST_DB
from benchmarks.quality_page import TITLES, rows_by_column
from cachedit_fx.figure import new_figure, save_figure

COLORS = {"ours": "#1f4e79", "ours, tuned": "#3fa7a0", "cache-dit": "#f2a541", "fewer steps": "#6b7a86"}
MARKERS = {"ours": "o", "ours, tuned": "D", "cache-dit": "s", "fewer steps": "^"}


def draw(measured: Mapping[str, Any], path: Path, targets: Sequence[float] = TARGETS) -> None:
    """Plots configurations as points and frontiers as lines. The suffix of the path determines the format."""
    models = measured["models"]
    figure = new_figure(6 * len(models), 5)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (model, found) in zip(panels, models.items(), strict=True):
        _panel(axes, found, targets)
        axes.set_title(TITLES.get(model, model))
    panels[0].set_ylabel("PSNR against the uncached model (dB)")
    panels[0].legend()
    save_figure(figure, path)


def _panel(axes: Any, measured: Mapping[str, Any], targets: Sequence[float]) -> None:
    for family, found in rows_by_column(measured).items():
        rows = [row for row in found if row["psnr"] < MOST_DB]
        style: dict[str, Any] = {"color": COLORS.get(family), "marker": MARKERS.get(family)}
        axes.scatter([r["share"] for r in rows], [r["psnr"] for r in rows], s=10, alpha=0.35, linewidth=0, **style)
        line = frontier(rows)
        axes.plot([r["share"] for r in line], [r["psnr"] for r in line], label=family, markersize=4, **style)
    for target in targets:
        axes.axhline(target, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlabel("share of the uncached model's FLOPs")
    axes.set_xlim(0, 1)
    axes.set_ylim(20, 65)
