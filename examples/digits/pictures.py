"""Draws the two figures of the demo: the digits side by side, and the decision of the cache at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

if TYPE_CHECKING:
    from cachedit_fx.inspect import CacheStats

matplotlib.use("agg")  # This backend needs no display.

COMPUTED, REUSED = "#1f4e79", "#f2a541"
DPI = 150


@dataclass(frozen=True, slots=True)
class Outcome:
    """One digit from both pipelines. Images are float32 [8, 8] in [-1, 1], times are in seconds."""

    digit: int
    uncached: Tensor
    cached: Tensor
    uncached_seconds: float
    cached_seconds: float
    stats: CacheStats

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio of the cached image against the uncached one, in dB; infinite if equal."""
        error = (self.cached - self.uncached).square().mean().item()
        peak = 2.0  # From -1 to 1.
        return 10 * math.log10(peak**2 / error) if error else math.inf


def draw_grid(outcomes: list[Outcome], path: Path) -> None:
    """Writes a figure with one column per digit, and the rows uncached, cached and difference with the PSNR."""
    figure, rows = plt.subplots(3, len(outcomes), figsize=(1.2 * len(outcomes) + 0.8, 4.6), layout="constrained")
    ink = {"cmap": "gray_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
    # A quarter of the range from -1 to 1 is the brightest color; otherwise, relevant differences would be invisible.
    glow = {"cmap": "magma", "vmin": 0, "vmax": 0.5, "interpolation": "nearest"}
    for column, o in enumerate(outcomes):
        uncached, cached, difference = rows[:, column]
        uncached.imshow(o.uncached, **ink)
        cached.imshow(o.cached, **ink)
        shown = difference.imshow((o.cached - o.uncached).abs(), **glow)
        uncached.set_title(str(o.digit))
        cached.set_xlabel(f"{len(o.stats.cached_steps)}/{o.stats.num_steps} reused", fontsize=8)
        difference.set_xlabel(f"{o.psnr:.1f} dB", fontsize=8)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, name in zip(rows[:, 0], ("uncached", "cached", "|difference|"), strict=True):
        axes.set_ylabel(name)
    # The color bar takes room from all rows, so that their columns stay aligned.
    figure.colorbar(shown, ax=rows, shrink=0.3, anchor=(0, 0.05), aspect=8, pad=0.005)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_timeline(outcomes: list[Outcome], threshold: float, path: Path) -> None:
    """Writes a figure with the diff of each step and the threshold, and below it the steps that were computed."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(10, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    _draw_diffs(above, outcomes, threshold)
    _draw_decisions(below, outcomes)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _draw_diffs(axes: Axes, outcomes: list[Outcome], threshold: float) -> None:
    for o in outcomes:
        steps = sorted(o.stats.residual_diffs)
        diffs = [o.stats.residual_diffs[s] for s in steps]
        reused = set(o.stats.cached_steps)
        axes.plot(steps, diffs, color="0.8", linewidth=0.8, zorder=1)
        axes.scatter(steps, diffs, c=[REUSED if s in reused else COMPUTED for s in steps], s=16, zorder=2)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"threshold {threshold:g}", (0, threshold), xytext=(0, 4), textcoords="offset points", fontsize=9)
    axes.set_ylabel("change of the first block's residual\nsince the last computed step")
    axes.set_ylim(bottom=0)
    axes.set_title("one line per digit; a step below the threshold is reused")


def _draw_decisions(axes: Axes, outcomes: list[Outcome]) -> None:
    steps = max(o.stats.num_steps for o in outcomes)
    reused = [[int(s in o.stats.cached_steps) for s in range(steps)] for o in outcomes]
    colors = ListedColormap([COMPUTED, REUSED])
    # The coordinates are centers of the cells, so that step s is below the point at s.
    axes.pcolormesh(range(steps), range(len(outcomes)), reused, cmap=colors, vmin=0, vmax=1, edgecolors="white")
    axes.set_yticks(range(len(outcomes)), [str(o.digit) for o in outcomes])
    axes.invert_yaxis()
    axes.set_ylabel("digit")
    axes.set_xlabel("step")
    axes.legend(
        handles=[Patch(color=COMPUTED, label="computed"), Patch(color=REUSED, label="reused")],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2,
        frameon=False,
    )
