"""Draws the charts of a run as SVG.

A computed step is a filled circle or bar, a reused step a hollow diamond or a hatched bar.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachedit_fx.inspect.pages.axes import LEGEND_ROW, Frame, Scale, frame, step_ticks, ticks
from cachedit_fx.inspect.pages.svg import Anchor, points, tag, text, title
from cachedit_fx.inspect.pages.thresholds import measured
from cachedit_fx.inspect.pages.words import why
from cachedit_fx.runtime.stats import CacheStats

_FAR = 1.6  # A threshold that is more than this many times the largest diff is shown at the edge of the chart.
_OUTLIER = 3  # A step that took more than this many medians is cut off, so that the others are distinguishable.


def diff_chart(entry: CacheStats) -> str:
    """Returns a chart of the diff of every step and its threshold."""
    entries = [("computed", "computed"), ("reused", "reused")]
    if entry.thresholds:
        entries.append(("threshold", f"threshold {threshold_text(entry)}"))
    if any(step not in entry.compared for step in range(entry.num_steps)):
        entries.append(("unprobed", "diff not used"))
    legend = Legend.of(entry, entries)
    axes = _per_step(entry, largest_shown(entry), legend)
    return axes.svg(itertools.chain(legend.parts(), _diffs(entry, axes)), f"Diff per step, {_counts(entry)}")


def threshold_text(entry: CacheStats) -> str:
    """Returns the threshold, or its range if it changed; empty if no threshold was used."""
    values = sorted({f"{value:.3g}" for value in entry.thresholds.values()}, key=float)
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}" if values else ""


def largest_shown(entry: CacheStats) -> float:
    """Returns the largest value on the axis of the diffs. Thresholds far above all diffs are not on it."""
    diffs = [diff for diff in entry.compared.values() if math.isfinite(diff)]
    largest = max(diffs, default=0.0)
    near = [value for value in entry.thresholds.values() if math.isfinite(value) and value <= _FAR * largest]
    if largest <= 0:
        return 1.03 * max(entry.thresholds.values(), default=1.0)
    return 1.03 * max([largest, *near])


def _diffs(entry: CacheStats, axes: Frame) -> Iterator[str]:
    yield from axes.rows("accumulated diff" if entry.adds_up else "diff (relative L1)")
    yield from axes.columns("step", step_ticks(entry.num_steps))
    yield from _threshold(entry, axes)
    finite = [(step, diff) for step, diff in sorted(entry.compared.items()) if math.isfinite(diff)]
    yield tag("polyline", points=points(*((axes.x(s), axes.y(d)) for s, d in finite)), class_="faint")
    for step in range(entry.num_steps):
        diff = entry.compared.get(step)
        shown = "not used" if diff is None else f"{diff:.4g}"
        words = f"step {step}: {_decision(entry, step)}, diff {shown}. {why(_reason(entry, step))}"
        if diff is None:
            y = axes.y.start
            yield tag("g", title(words), mark(axes.x(step), y, step in entry.cached_steps, size=3.6, class_="unprobed"))
        else:
            y = axes.y(diff) if math.isfinite(diff) else axes.y.stop
            yield tag("g", title(words), mark(axes.x(step), y, step in entry.cached_steps))


def _threshold(entry: CacheStats, axes: Frame) -> Iterator[str]:
    """Yields the line of the thresholds. Where a threshold is above the chart, the line is at its edge."""
    thresholds = sorted(entry.thresholds.items())
    if not thresholds:
        return
    half = abs(axes.x(0.5) - axes.x(0))
    stairs = [
        (axes.x(step) + side, axes.y(min(value, axes.y.high))) for step, value in thresholds for side in (-half, half)
    ]
    yield tag("polyline", points=points(*stairs), class_="threshold")
    above = [value for _, value in thresholds if value > axes.y.high]
    if above:
        words = f"↑ threshold {max(above):.3g}, above this chart"
        yield text(axes.x.stop, axes.y.stop + 15, words, "threshold-name", "end")


def time_chart(entry: CacheStats) -> str:
    """Returns a chart of the time of every step; empty if no times were measured."""
    seconds = list(entry.step_seconds)
    if not seconds:
        return ""
    entries = [("bar-computed", "computed"), ("bar-reused", "reused")]
    if any(second > longest_shown(entry) for second in seconds):
        entries.append(("", "↑ cut off, such as a call that compiles"))
    legend = Legend.of(entry, entries)
    axes = _per_step(entry, 1e3 * longest_shown(entry), legend)
    return axes.svg(itertools.chain(legend.parts(), _times(entry, axes, seconds)), f"Time per step, {_counts(entry)}")


def longest_shown(entry: CacheStats) -> float:
    """Returns the seconds of the longest step that is not an outlier; 0 if no times were measured.

    A step that compiles is an outlier.
    """
    reused = set(entry.cached_steps)
    by_kind: tuple[list[float], list[float]] = ([], [])
    for step, second in enumerate(entry.step_seconds):
        by_kind[step in reused].append(second)
    usual = max((statistics.median(seconds) for seconds in by_kind if seconds), default=0.0)
    return max((second for seconds in by_kind for second in seconds if second <= _OUTLIER * usual), default=0.0)


def _times(entry: CacheStats, axes: Frame, seconds: Sequence[float]) -> Iterator[str]:
    yield from axes.rows("ms per step")
    yield from axes.columns("step", step_ticks(entry.num_steps))
    width = min(26.0, 0.7 * abs(axes.x(1) - axes.x(0)))
    reused = set(entry.cached_steps)
    for step, second in enumerate(seconds):
        x, is_cut = axes.x(step), 1e3 * second > axes.y.high
        y = axes.y(min(1e3 * second, axes.y.high))
        class_ = "bar-reused" if step in reused else "bar-computed"
        shape = tag("rect", x=x - width / 2, y=y, width=width, height=axes.y.start - y, class_=class_)
        cut = text(x, y + 13, "↑", "cut", "middle") if is_cut else ""
        yield tag("g", title(f"step {step}: {_decision(entry, step)}, {1e3 * second:.3g} ms"), shape, cut)


def error_chart(entry: CacheStats) -> str:
    """Returns a chart of the error of the output and of every stream at each step; empty without errors."""
    if not entry.errors:
        return ""
    values = [v for e in entry.errors.values() for v in (e.output, *e.streams.values()) if math.isfinite(v)]
    streams = [(f"stream-{i % 3}", role) for i, role in enumerate(roles_of(entry))]
    legend = Legend.of(entry, [("computed", "computed"), ("reused", "reused"), ("output", "output"), *streams])
    axes = _per_step(entry, 1.03 * max(values, default=1.0), legend)
    parts = itertools.chain(legend.parts(), _errors(entry, axes))
    return axes.svg(parts, f"Error of reusing, per step, {_counts(entry)}")


def roles_of(entry: CacheStats) -> list[str]:
    """Returns the roles of the streams whose errors were measured."""
    return list(dict.fromkeys(role for error in entry.errors.values() for role in error.streams))


def _errors(entry: CacheStats, axes: Frame) -> Iterator[str]:
    yield from axes.rows("error (relative L2)")
    yield from axes.columns("step", step_ticks(entry.num_steps))
    for number, role in enumerate(roles_of(entry)):
        line = [(s, e.streams[role]) for s, e in sorted(entry.errors.items()) if role in e.streams]
        place = points(*((axes.x(s), axes.y(v)) for s, v in line if math.isfinite(v)))
        yield tag("g", title(f"stream {role}"), tag("polyline", points=place, class_=f"stream-{number % 3}"))
    line = [(step, error.output) for step, error in sorted(entry.errors.items()) if math.isfinite(error.output)]
    yield tag("polyline", points=points(*((axes.x(s), axes.y(v)) for s, v in line)), class_="output")
    for step, value in line:
        words = f"step {step}: {_decision(entry, step)}; the error of reusing it is {value:.3g}"
        yield tag("g", title(words), mark(axes.x(step), axes.y(value), step in entry.cached_steps))


def scatter_chart(entry: CacheStats) -> str:
    """Returns a chart of error against diff with the largest error below every threshold; empty without errors."""
    steps = measured(entry)
    if not steps:
        return ""
    entries = [("computed", "computed"), ("reused", "reused"), ("worst", "largest error below that diff")]
    if entry.thresholds:
        entries.append(("threshold", "threshold"))
    legend = Legend.of(entry, entries)
    largest = max(one.diff for one in steps)
    near = [value for value in entry.thresholds.values() if value <= _FAR * largest]
    high = 1.03 * max(one.error for one in steps)
    axes = frame((0.0, 1.06 * max(largest, *near, 1e-9)), high, legend_rows=legend.num_rows)
    parts = itertools.chain(legend.parts(), _scatter(entry, axes))
    return axes.svg(parts, f"Error against diff of {len(steps)} steps")


def _scatter(entry: CacheStats, axes: Frame) -> Iterator[str]:
    steps = measured(entry)
    yield from axes.rows("error of the output (relative L2)")
    yield from axes.columns("diff (relative L1)", [value for value in ticks(axes.x.high) if value <= axes.x.high])
    worst = list(itertools.accumulate((one.error for one in steps), max))
    stairs: list[tuple[float, float]] = []
    for one, error in zip(steps, worst, strict=True):
        x = axes.x(one.diff)
        stairs += [(x, stairs[-1][1] if stairs else axes.y.start), (x, axes.y(error))]
    yield tag("polyline", points=points(*stairs, (axes.x.stop, stairs[-1][1])), class_="worst")
    thresholds = sorted(set(entry.thresholds.values()))
    for value in dict.fromkeys((*thresholds[:1], *thresholds[-1:])):
        if value > axes.x.high:
            words = f"threshold {value:.3g}, beyond this chart →"
            yield text(axes.x.stop, axes.y.stop + 15, words, "threshold-name", "end")
            continue
        x = axes.x(value)
        yield tag("line", x1=x, y1=axes.y.start, x2=x, y2=axes.y.stop, class_="threshold")
        anchor: Anchor = "end" if x > axes.x.stop - 140 else "start"
        offset = -6 if anchor == "end" else 6
        yield text(x + offset, axes.y.stop + 13, f"threshold {value:.3g}", "threshold-name", anchor)
    for one in steps:
        words = f"step {one.step}: diff {one.diff:.4g}, error {one.error:.3g}"
        yield tag("g", title(words), mark(axes.x(one.diff), axes.y(one.error), one.is_reused))


def spark(entry: CacheStats, width: float = 150, height: float = 30) -> str:
    """Returns a small chart of the diffs of a session that fits into a row of a table."""
    finite = [d for d in (*entry.compared.values(), *entry.thresholds.values()) if math.isfinite(d)]
    x = Scale(0, max(1, entry.num_steps - 1), 6, width - 6)
    y = Scale(0, max(finite, default=1.0) or 1.0, height - 5, 5)
    parts = []
    if entry.thresholds:
        place = [(x(step), y(value)) for step, value in sorted(entry.thresholds.items())]
        parts.append(tag("polyline", points=points(*place), class_="threshold"))
    for step in range(entry.num_steps):
        diff = entry.compared.get(step)
        value = diff if diff is not None and math.isfinite(diff) else 0.0
        parts.append(
            mark(x(step), y(value), step in entry.cached_steps, size=3, class_="unprobed" if diff is None else "")
        )
    box = dict(viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}", height=f"{height:.0f}")
    return tag("svg", *parts, class_="ch", role="img", aria_label=f"Diffs, {_counts(entry)}", **box)


def mark(x: float, y: float, is_reused: bool, *, size: float = 5.0, class_: str = "") -> str:
    """Returns the mark of a step: a circle if it was computed, a diamond if it was reused."""
    if not is_reused:
        return tag("circle", cx=x, cy=y, r=size, class_=f"computed {class_}".strip())
    reach = 1.25 * size
    corners = points((x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y))
    return tag("polygon", points=corners, class_=f"reused {class_}".strip())


@dataclass(frozen=True, slots=True)
class Legend:
    """The legend above a chart: the class of a mark or a line, its label, and its place in rows.

    Attributes:
        places: Class, label, and the left end of each entry, and the number of its row.
        num_rows: The number of rows.
    """

    places: tuple[tuple[str, str, float, int], ...]
    num_rows: int

    @classmethod
    def of(cls, entry: CacheStats, entries: Sequence[tuple[str, str]], width: float = 430) -> Legend:
        """Returns the legend of a chart. In shadow mode, decisions are what would have been done."""
        places, x, row = [], 4.0, 0
        for class_, label in entries:
            if entry.errors and class_ in _SHADOW:
                label = _SHADOW[class_]
            needed = _swatch(class_) + 8.8 * len(label) + 14  # Wide enough for the larger type on a phone.
            if x + needed > width and x > 4:
                x, row = 4.0, row + 1
            places.append((class_, label, x, row))
            x += needed
        return cls(tuple(places), row + 1)

    def parts(self) -> Iterator[str]:
        """Yields the entries."""
        for class_, label, x, row in self.places:
            y = 12 + LEGEND_ROW * (row + 1)
            if class_ in ("computed", "reused", "unprobed"):
                marks = mark(x + 8, y - 4, class_ == "reused", class_="unprobed" if class_ == "unprobed" else "")
                yield tag("g", marks)
            elif class_.startswith("bar-"):
                yield tag("rect", x=x + 1, y=y - 10, width=14, height=11, class_=class_)
            elif class_:
                yield tag("polyline", points=points((x, y - 4), (x + 26, y - 4)), class_=class_)
            yield text(x + _swatch(class_), y, label, "legend-text")


_MARKS = ("computed", "reused", "unprobed", "bar-computed", "bar-reused")
_SHADOW = {
    "computed": "would compute",
    "reused": "would reuse",
    "bar-computed": "would compute",
    "bar-reused": "would reuse",
}


def _swatch(class_: str) -> float:
    """Returns the width of the mark or the line before a label."""
    return 0.0 if not class_ else 20.0 if class_ in _MARKS else 32.0


def _per_step(entry: CacheStats, high: float, legend: Legend) -> Frame:
    return frame((-0.6, max(0.6, entry.num_steps - 0.4)), high, legend_rows=legend.num_rows)


def _counts(entry: CacheStats) -> str:
    return f"{len(entry.cached_steps)} of {entry.num_steps} steps reused"


def _decision(entry: CacheStats, step: int) -> str:
    return "reused" if step in entry.cached_steps else "computed"


def _reason(entry: CacheStats, step: int) -> str:
    return entry.decisions[step] if step < len(entry.decisions) else ""
