"""The picture of what `tune` measured: quality over speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cachedit_fx.figure import new_figure
from cachedit_fx.tuning.points import Alternative, Point, Quality
from cachedit_fx.tuning.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _DARK = "#1f66b8", "#d06000", "#9aa3ab", "#444444"
# One color and marker for each solver, in the order in which the solvers appear.
_SOLVER_STYLES = (("#2e8b57", "s"), ("#8a4fbf", "^"), ("#b8860b", "v"), ("#c2477f", "D"), ("#5b7083", "P"))
_TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 13, 16, 20, 30, 50)
_FINE_TICKS = tuple(number / 20 for number in range(20, 60))  # If fewer than four of the others are visible.
_ROOM = (1.15, 4.0)  # Beyond the measured points: a factor of the speed, and dB above and below.
_LABEL_GAP = 1.1  # The ratio of two speeds below which only one of the points has a label.
_MOST_DB = 100.0  # Outputs that are equal have 150 dB, which would flatten everything else.


def draw_frontier(
    target: Target,
    frontier: Sequence[Point],
    alternatives: Sequence[Alternative],
    chosen: tuple[str, Quality],
    title: tuple[str, str],
) -> Figure:
    """Returns a figure of all points, with the target and the choice.

    Args:
        target: The target.
        frontier: The configurations of the cache.
        alternatives: Fewer steps.
        chosen: The name of the choice, and its quality.
        title: The title, and a line below it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(9.6, 5.2)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    measured = [point.quality for point in frontier if point.is_measured]
    _draw_predicted(axes, [point.quality for point in frontier if not point.is_measured])
    _draw_cached(axes, [point for point in frontier if point.is_measured], chosen[1])
    _draw_alternatives(axes, alternatives)
    _set_limits(axes, [*measured, *(each.quality for each in alternatives), chosen[1]], target)
    _draw_choice(axes, *chosen)
    _draw_target(axes, target)
    axes.set_xlabel("speed-up of a generation (times, logarithmic)")
    axes.set_ylabel("PSNR against the uncached output (dB)")
    figure.suptitle(title[0], x=0.012, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(title[1], loc="left", fontsize=9.5, color=_DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=8.5, loc="outside right upper")
    return figure


def _set_limits(axes: Any, shown: Sequence[Quality], target: Target) -> None:
    """Shows all measured points; predicted ones that are far from them are outside."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    speeds = [quality.speedup for quality in shown] + ([target.value] if target.kind == "speedup" else [])
    dbs = [quality.psnr for quality in shown if quality.psnr < _MOST_DB] or [0.0]
    dbs += [target.value] if target.kind == "psnr" else []
    wider, higher = _ROOM
    low, high = max(min(speeds) / wider, 0.95), max(speeds) * wider
    axes.set_xlim(low, high)
    axes.set_ylim(min(dbs) - higher, max(dbs) + higher)
    coarse, fine = ([tick for tick in ticks if low <= tick <= high] for ticks in (_TICKS, _FINE_TICKS))
    axes.xaxis.set_major_locator(FixedLocator(coarse if len(coarse) >= 4 else fine))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_predicted(axes: Any, predicted: Sequence[Quality]) -> None:
    shown = [quality for quality in predicted if quality.psnr < _MOST_DB]
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": _GREY, "label": "with the cache, predicted"}
    if shown:
        axes.scatter([q.speedup for q in shown], [q.psnr for q in shown], s=24, zorder=2, **style)


def _draw_cached(axes: Any, measured: Sequence[Point], chosen: Quality) -> None:
    """Draws the measured configurations of the cache, and a line through those that no other one surpasses."""
    at = [(point.quality.speedup, point.quality.psnr) for point in measured if point.quality.psnr < _MOST_DB]
    best = sorted(here for here in at if all(other[1] < here[1] for other in at if other[0] > here[0]))
    style: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.5, "color": _BLUE, "zorder": 4}
    axes.plot(*(zip(*best, strict=True) if best else ((), ())), label="with the cache, measured", **style)
    axes.scatter(*(zip(*at, strict=True) if at else ((), ())), s=18, color=_BLUE, alpha=0.4, zorder=3)
    for point in measured:
        where, mask = (point.quality.speedup, point.quality.psnr), point.computed
        if where in best and mask and not 1 / _LABEL_GAP < where[0] / chosen.speedup < _LABEL_GAP:
            text, offset = f"{mask[0]} of {mask[1]}", (5, 4)
            axes.annotate(text, where, offset, textcoords="offset points", fontsize=7.5, color=_BLUE, zorder=5)


def _draw_alternatives(axes: Any, alternatives: Sequence[Alternative]) -> None:
    """Draws the alternatives of each solver, with their numbers of steps."""
    solvers = [*dict.fromkeys(each.solver for each in alternatives)]
    for number, solver in enumerate(solvers):
        color, marker = _SOLVER_STYLES[number % len(_SOLVER_STYLES)]
        for has_cache, label in ((False, f"fewer steps, {solver}"), (True, f"fewer steps, {solver}, with the cache")):
            found = [a for a in alternatives if a.solver == solver and (a.config is not None) == has_cache]
            if not found:
                continue
            found.sort(key=lambda each: each.quality.speedup)
            at = [each.quality.speedup for each in found], [each.quality.psnr for each in found]
            fill = "white" if has_cache else color
            style: dict[str, Any] = {"marker": marker, "color": color, "markerfacecolor": fill, "markersize": 7}
            axes.plot(*at, linestyle="" if has_cache else ":", linewidth=1.1, zorder=5, label=label, **style)
            _label_steps(axes, found, color)


def _label_steps(axes: Any, found: Sequence[Alternative], color: str) -> None:
    """Writes the number of steps below each point, unless the number of its neighbor is there already."""
    last = 0.0
    for each in reversed(found):
        speed = each.quality.speedup
        if last and last / speed < _LABEL_GAP:
            continue
        last = speed
        computed = each.computed
        text = f"{each.num_inference_steps} steps" if computed is None else f"{computed[0]} of {computed[1]}"
        axes.annotate(
            *(text, (speed, each.quality.psnr), (0, -15)),
            textcoords="offset points", ha="center", fontsize=7.5, color=color, zorder=5,
        )  # fmt: skip


def _draw_choice(axes: Any, name: str, chosen: Quality) -> None:
    at = chosen.speedup, min(chosen.psnr, _MOST_DB)
    style: dict[str, Any] = {"marker": "*", "s": 280, "color": _ORANGE, "edgecolors": "white", "linewidths": 0.8}
    axes.scatter([at[0]], [at[1]], zorder=6, label="chosen", **style)
    low, high = axes.get_ylim()
    is_high = at[1] > low + 0.7 * (high - low)
    text = "\n".join([*name.split(", "), f"{chosen.psnr:.1f} dB, {chosen.speedup:.2f}\u00d7"])
    where: dict[str, Any] = {"xytext": (9, -9 if is_high else 9), "va": "top" if is_high else "bottom"}
    axes.annotate(
        *(text, at),
        **where, textcoords="offset points", fontsize=8.5, color=_ORANGE, fontweight="bold", zorder=7,
    )  # fmt: skip


def _draw_target(axes: Any, target: Target) -> None:
    style: dict[str, Any] = {"color": _DARK, "linestyle": "--", "linewidth": 1.0, "label": f"target: {target}"}
    shade: dict[str, Any] = {"color": _BLUE, "alpha": 0.05, "linewidth": 0, "zorder": 0}
    if target.kind == "psnr":
        axes.axhline(target.value, **style)
        axes.axhspan(target.value, axes.get_ylim()[1], **shade)
    if target.kind == "speedup":
        axes.axvline(target.value, **style)
        axes.axvspan(target.value, axes.get_xlim()[1], **shade)
