"""The result of `tune`: `TuneResult`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.figure import new_figure, save_figure
from cachedit_fx.integrations.signature import Signature
from cachedit_fx.tuning.saved import save
from cachedit_fx.tuning.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {True: ("o", "#1f66b8", "measured"), False: ("x", "#999999", "predicted")}


@dataclass(frozen=True)
class Quality:
    """The quality and the speed of a configuration.

    Attributes:
        psnr: The PSNR in dB, of the mean squared error over all images against the uncached ones.
        rel_l2: The relative L2 distance, dimensionless, as the root mean square over the images.
        speedup: The speed-up of a whole generation, computed from the times without the cache.
        share_computed: The share of the steps that are computed. If reused steps run blocks too, the share of the
            model's time.
    """

    psnr: float
    rel_l2: float
    speedup: float
    share_computed: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.1f} dB, relative L2 {self.rel_l2:.3g}, {self.speedup:.2f} times as fast, "
            f"{self.share_computed:.0%} computed"
        )


@dataclass(frozen=True)
class Point:
    """A configuration and its quality.

    Attributes:
        config: The configuration.
        quality: Its quality.
        is_measured: Whether the quality was measured. If not, it is predicted, and its `rel_l2` is NaN.
    """

    config: CacheConfig
    quality: Quality
    is_measured: bool


@dataclass(frozen=True)
class TuneResult:
    """A configuration for `enable_cache`, and its quality.

    Attributes:
        config: The chosen configuration.
        target: The target of the search.
        is_reached: Whether the target was reached, including the margin.
        predicted: The quality to expect for other calls: the measured quality less the margin.
        verified: The quality that was measured on the given calls.
        is_confirmed: Whether `verified` was measured with the cache enabled, and not by simulating the schedule.
        frontier: All points that were measured or predicted, fastest first.
        signature: What the configuration was tuned on.
    """

    config: CacheConfig
    target: Target
    is_reached: bool
    predicted: Quality
    verified: Quality
    is_confirmed: bool
    frontier: tuple[Point, ...]
    signature: Signature

    def __str__(self) -> str:
        reached = "reached" if self.is_reached else "not reached"
        return f"{self.target} {reached}\n  predicted: {self.predicted}\n  verified:  {self.verified}"

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes a YAML file (JSON if the path ends in `.json`) for `load_tuned` and `load_configs`.

        Raises:
            ImportError: The path does not end in `.json`, and PyYAML is not installed.
        """
        found = {
            "target": str(self.target),
            "predicted": _rounded(self.predicted),
            "verified": _rounded(self.verified),
            "signature": self.signature,
        }
        return save(path, self.config, found)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Plots quality over speed: the measured and predicted points, the choice and the target.

        Args:
            path: The file to write, if any: png, svg or pdf.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        figure = new_figure(7.0, 4.2)
        axes = figure.add_subplot()
        for is_measured, (marker, color, label) in _STYLES.items():
            shown = [point.quality for point in self.frontier if point.is_measured == is_measured]
            axes.scatter([q.speedup for q in shown], [q.psnr for q in shown], marker=marker, color=color, label=label)
        chosen = self.verified
        axes.scatter([chosen.speedup], [chosen.psnr], marker="*", s=180, color="#d06000", label="chosen", zorder=3)
        if self.target.kind == "psnr":
            axes.axhline(self.target.value, color="#555555", linestyle="--", label=str(self.target))
        if self.target.kind == "speedup":
            axes.axvline(self.target.value, color="#555555", linestyle="--", label=str(self.target))
        axes.set_xlabel("speed-up of a generation")
        axes.set_ylabel("PSNR against uncached (dB)")
        axes.set_title(f"{self.signature.get('pipeline', '')}: {self.target}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        if path is not None:
            save_figure(figure, path)
        return figure


def _rounded(quality: Quality) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in dataclasses.asdict(quality).items()}
