"""Plots the chain of a graph and the steps of a run with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cachedit_fx.figure import new_figure, save_figure
from cachedit_fx.inspect.explanation.data import GraphReport
from cachedit_fx.inspect.explanation.units import flops
from cachedit_fx.inspect.pages.charts import longest_shown
from cachedit_fx.inspect.pages.layout import runs_of
from cachedit_fx.inspect.pages.pieces import kinds_of
from cachedit_fx.inspect.pages.ran import place
from cachedit_fx.runtime.stats import CacheStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND = {"Fn": "#dddddd", "Bn": "#dddddd", "region": "#f5d6f0"}
_BROKEN = "#c62f12"
_COMPUTED, _REUSED = "#1f66b8", "#d06000"


def plot_chain(graph: GraphReport, path: str | Path | None = None) -> Figure:
    """Plots the chain with one bar per block, on a background of Fn, regions and Bn.

    The height of a bar is the FLOPs of the block, and its color is the piece.

    Args:
        graph: The report of the graph.
        path: The file to write, if any: png, svg or pdf.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    count = len(graph.blocks)
    figure = new_figure(max(6.5, min(20.0, 2.5 + 0.32 * count)), 3.6)
    axes = figure.add_subplot()
    if not count:
        axes.text(0.5, 0.5, "no chain of blocks", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return _saved(figure, path)
    _bars(axes, graph)
    _bands(axes, graph)
    title = f"{graph.cls}: " if graph.cls else ""
    verdict = f"a reused step skips {graph.saved_flops:.1%} of the FLOPs" if graph.is_cached else "not cached"
    axes.set_title(title + verdict, loc="left", pad=22)
    axes.set_xlabel("block")
    axes.set_ylabel("FLOPs")
    axes.set_xlim(-0.8, count - 0.2)
    axes.yaxis.set_major_formatter(lambda value, _: flops(int(value)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    if graph.broken_at is not None:
        axes.axvline(graph.broken_at - 0.5, color=_BROKEN, linestyle="--")
        axes.annotate(
            graph.broken, (graph.broken_at - 0.5, 1), (0, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", color=_BROKEN,
        )  # fmt: skip
    return _saved(figure, path)


def plot_run(stats: Sequence[CacheStats], path: str | Path | None = None) -> Figure:
    """Plots the diffs with the threshold, and the time of every step, for each region of each session.

    Args:
        stats: The statistics of the regions and sessions.
        path: The file to write, if any: png, svg or pdf.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(11.0, max(2.8, 2.7 * len(stats)))
    if not stats:
        axes = figure.add_subplot()
        axes.text(0.5, 0.5, "no session has run yet", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return _saved(figure, path)
    grid = figure.subplots(len(stats), 2, squeeze=False)
    for (left, right), entry in zip(grid, stats, strict=True):
        _diffs(left, entry)
        _times(right, entry)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.set_xlim(-0.7, max(0.7, entry.num_steps - 0.3))
            axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _bars(axes: Axes, graph: GraphReport) -> None:
    kinds, kind_of = kinds_of(graph.blocks)
    for kind in kinds:
        of_kind = [block for block, index in zip(graph.blocks, kind_of, strict=True) if index == kind.index]
        axes.bar(
            [block.number for block in of_kind],
            [block.cost.flops for block in of_kind],
            width=0.8,
            color=kind.color,
            edgecolor="#333333",
            linewidth=0.6,
            hatch="//" if kind.is_striped else None,
            label=f"{kind.name} × {kind.count}",
            zorder=2,
        )


def _bands(axes: Axes, graph: GraphReport) -> None:
    for (part, region), blocks in runs_of(graph.blocks):
        color = _BAND.get(part)
        if color is None:
            continue
        first, last = blocks[0].number, blocks[-1].number + 1
        axes.axvspan(first - 0.5, last - 0.5, color=color, zorder=0, linewidth=0)
        name = part if region is None else f"region {region}"
        center = (first + last - 1) / 2
        axes.annotate(
            name, (center, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
        )


def _diffs(axes: Axes, entry: CacheStats) -> None:
    reused = set(entry.cached_steps)
    finite = {step: diff for step, diff in entry.compared.items() if math.isfinite(diff)}
    for is_reused, marker, color, name in ((False, "o", _COMPUTED, "computed"), (True, "D", _REUSED, "reused")):
        steps = [step for step in range(entry.num_steps) if (step in reused) == is_reused]
        probed = [step for step in steps if step in finite]
        face = "none" if is_reused else color
        axes.scatter(
            probed, [finite[step] for step in probed], marker=marker, edgecolors=color, facecolors=face, label=name
        )
        unprobed = [step for step in steps if step not in finite]
        axes.scatter(unprobed, [0.0] * len(unprobed), marker=marker, s=14, edgecolors=color, facecolors=face, alpha=0.5)
    thresholds = sorted(entry.thresholds.items())
    if thresholds:
        axes.step(*zip(*thresholds, strict=True), where="mid", color="#555555", linestyle="--", label="threshold")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("diff (relative L1)")
    axes.set_title(f"{entry.session}, {place(entry)}", loc="left", fontsize=10)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.1)


def _times(axes: Axes, entry: CacheStats) -> None:
    reused, seconds = set(entry.cached_steps), list(entry.step_seconds)
    for is_reused, color, hatch, name in ((False, _COMPUTED, None, "computed"), (True, _REUSED, "//", "reused")):
        steps = [step for step in range(len(seconds)) if (step in reused) == is_reused]
        heights = [1e3 * seconds[step] for step in steps]
        axes.bar(steps, heights, color=color, alpha=0.8, hatch=hatch, edgecolor="white", linewidth=0.3, label=name)
    if seconds:
        axes.set_ylim(0, 1e3 * 1.1 * longest_shown(entry) or None)
    axes.set_ylabel("ms per step")


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        save_figure(figure, path)
    return figure
