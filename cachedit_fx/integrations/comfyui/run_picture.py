"""Draws the decisions of a run as a picture in the format of ComfyUI's IMAGE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cachedit_fx.figure import new_figure
from cachedit_fx.runtime.stats import CacheStats, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COMPUTED, _REUSED, _THRESHOLD = "#1f66b8", "#f0a060", "#555555"
_DPI = 100


def picture_of(summary: Summary) -> torch.Tensor:
    """A picture of the decisions, [1, H, W, 3], float32, from 0 to 1.

    For each conditioning, a row of squares shows which steps were computed and which reused, and the bars below it the
    value that was compared with the threshold, if there was one.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    heights = [2.2 if entry.thresholds else 1.1 for entry in summary]
    figure = new_figure(10.0, max(1.6, 0.7 + sum(heights)))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    if summary:
        figure.suptitle(_title_of(summary), x=0.01, ha="left", fontsize=12)
        rows = figure.subplots(len(summary), squeeze=False, height_ratios=heights)[:, 0]
        for axes, entry, label in zip(rows, summary, _labels_of(summary), strict=True):
            _draw(axes, entry, label)
    else:
        text = "\n".join(summary.lines) or "No sampler has run yet."
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, wrap=True)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[None, ..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _draw(axes: Axes, entry: CacheStats, label: str) -> None:
    """Draws the steps of one conditioning: a row of squares and, if there was a threshold, bars below it."""
    from matplotlib.ticker import MaxNLocator

    reused = set(entry.cached_steps)
    computed = [step for step in range(entry.num_steps) if step not in reused]
    compared = {step: value for step, value in entry.compared.items() if math.isfinite(value)}
    largest = max([*compared.values(), *entry.thresholds.values()], default=0.0) if entry.thresholds else 0.0
    top = 1.15 * largest or 1.0
    for color, steps in ((_COMPUTED, computed), (_REUSED, sorted(reused))):
        axes.bar(steps, [0.3 * top] * len(steps), bottom=1.1 * top, width=0.9, color=color)
        if entry.thresholds:
            bars = [step for step in steps if step in compared]
            axes.bar(bars, [compared[step] for step in bars], width=0.9, color=color, alpha=0.75)
    if entry.thresholds:
        axes.step([*entry.thresholds], [*entry.thresholds.values()], where="mid", color=_THRESHOLD, linestyle="--")
        axes.set_ylabel("residual diff", fontsize=9)
    axes.set_xlim(-0.7, max(entry.num_steps - 0.3, 0.7))
    axes.set_ylim(0 if entry.thresholds else top, 1.45 * top)
    axes.set_yticks([0.0, largest] if largest else [])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title(f"{label}: {_counts(entry)}", loc="left", fontsize=10)


def _counts(entry: CacheStats) -> str:
    num_reused = len(entry.cached_steps)
    return f"{entry.num_steps} steps, {entry.num_steps - num_reused} computed (blue), {num_reused} reused (orange)"


def _title_of(summary: Summary) -> str:
    num_steps = sum(entry.num_steps for entry in summary)
    num_reused = sum(len(entry.cached_steps) for entry in summary)
    return f"{summary.title}: {num_reused} of {num_steps} calls reused the blocks"


def _labels_of(entries: Sequence[CacheStats]) -> list[str]:
    """The names of the conditionings: their run and kind, numbered where several are of one kind."""
    names, labels = [_name_of(entry) for entry in entries], []
    for i, name in enumerate(names):
        number = names[:i].count(name) + 1
        labels.append(f"{name} {number}" if names.count(name) > 1 else name)
    return labels


def _name_of(entry: CacheStats) -> str:
    """The run and the kind of a conditioning, without its uuid: "run 3, cond"."""
    run, _, branch = entry.session.partition(", ")
    return f"{run}, {branch.partition(' ')[0]}" if branch else run
