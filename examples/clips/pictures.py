"""Draws the clips of the demo, without and with the cache: a contact sheet with the decisions, and an animation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from cachedit_fx.inspect import CacheStats

matplotlib.use("agg")  # This backend needs no display.

COMPUTED, REUSED = "#1f4e79", "#f2a541"
DPI = 100
FRAMES_PER_SECOND = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """One clip from both pipelines.

    Attributes:
        caption: The prompt.
        uncached, cached: The clips, float32 [3, 8, 16, 16] in [-1, 1].
        uncached_seconds, cached_seconds: The durations of the calls of the pipelines.
        stats: The statistics of the cache, one for each guidance branch.
        uncached_read, cached_read: What the judge reads in the clips, in the form of a caption.
        uncached_right, cached_right: Whether this is what the caption says.
    """

    caption: str
    uncached: Tensor
    cached: Tensor
    uncached_seconds: float
    cached_seconds: float
    stats: list[CacheStats]
    uncached_read: str
    cached_read: str
    uncached_right: bool
    cached_right: bool

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio of the cached clip against the uncached one, in dB; infinite if equal."""
        error = (self.cached - self.uncached).square().mean().item()
        peak = 2.0  # From -1 to 1.
        return 10 * math.log10(peak**2 / error) if error else math.inf


def draw_sheet(outcomes: list[Outcome], path: Path) -> None:
    """Writes a figure with the frames of each clip in a row, without and with the cache, and the decisions below."""
    figure = plt.figure(figsize=(13, 1.9 * math.ceil(len(outcomes) / 2) + 0.5), layout="constrained")
    cells = figure.subfigures(math.ceil(len(outcomes) / 2), 2, squeeze=False).flat
    for cell, o in zip(cells, outcomes, strict=False):
        uncached, cached, decisions = cell.subplots(3, 1, height_ratios=(3, 3, 1))
        uncached.imshow(_strip(o.uncached), interpolation="nearest")
        cached.imshow(_strip(o.cached), interpolation="nearest")
        _draw_decisions(decisions, o)
        cell.suptitle(f"{o.caption} ({o.psnr:.1f} dB)", fontsize=9)
        for axes, name in ((uncached, "uncached"), (cached, "cached")):
            axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
            axes.set_xticks([])
            axes.set_yticks([])
    figure.legend(
        handles=[Patch(color=COMPUTED, label="computed step"), Patch(color=REUSED, label="reused step")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_animation(outcomes: list[Outcome], path: Path) -> None:
    """Writes an animated GIF with one column per clip, and the rows uncached, cached and difference."""
    figure, rows = plt.subplots(3, len(outcomes), figsize=(1.6 * len(outcomes), 5.6), squeeze=False)
    figure.subplots_adjust(left=0.04, right=0.995, top=0.88, bottom=0.02, wspace=0.06, hspace=0.06)
    shown = []
    for column, o in enumerate(outcomes):
        # A quarter of the range from -1 to 1 is the brightest color; otherwise, the differences would be invisible.
        difference = 2 * (o.cached - o.uncached).abs().mul(2).clamp(max=1) - 1
        for axes, clip in zip(rows[:, column], (o.uncached, o.cached, difference), strict=True):
            pixels = _pixels(clip)
            shown.append((axes.imshow(pixels[0], interpolation="nearest"), pixels))
            axes.set_xticks([])
            axes.set_yticks([])
        rows[0, column].set_title(o.caption.replace(", ", "\n"), fontsize=7)
    for axes, name in zip(rows[:, 0], ("uncached", "cached", "|difference|"), strict=True):
        axes.set_ylabel(name, fontsize=8)

    def show(frame: int) -> None:
        for image, pixels in shown:
            image.set_data(pixels[frame])

    num_frames = outcomes[0].uncached.shape[1]
    FuncAnimation(figure, show, num_frames).save(path, PillowWriter(fps=FRAMES_PER_SECOND), dpi=70)
    plt.close(figure)


def _pixels(clip: Tensor) -> Tensor:
    """Converts a clip to frames for `imshow`, [8, 16, 16, 3] in [0, 1]."""
    return clip.permute(1, 2, 3, 0) / 2 + 0.5


def _strip(clip: Tensor) -> Tensor:
    """Converts a clip to one picture of all frames, with a white line between them."""
    return torch.cat(list(pad(_pixels(clip), (0, 0, 0, 1), value=1.0)), dim=1)


def _draw_decisions(axes: Axes, outcome: Outcome) -> None:
    steps = max(s.num_steps for s in outcome.stats)
    reused = [[int(step in s.cached_steps) for step in range(steps)] for s in outcome.stats]
    colors = ListedColormap([COMPUTED, REUSED])
    axes.pcolormesh(range(steps), range(len(reused)), reused, cmap=colors, vmin=0, vmax=1, edgecolors="white")
    axes.set_yticks(range(len(reused)), [s.session for s in outcome.stats], fontsize=7)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.invert_yaxis()
