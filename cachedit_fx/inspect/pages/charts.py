"""Draws the charts of a run as SVG.

A computed step is a filled circle or bar, a reused step a hollow diamond or a hatched bar.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from cachedit_fx.inspect.pages.axes import Frame, Scale, frame, step_ticks, ticks
from cachedit_fx.inspect.pages.svg import points, tag, text, title
from cachedit_fx.inspect.pages.thresholds import measured
from cachedit_fx.inspect.pages.words import why
from cachedit_fx.runtime.stats import CacheStats

_OUTLIER = 3  # A step that took more than this many medians is cut off, so that the others are distinguishable.


def diff_chart(entry: CacheStats) -> str:
    """Returns a chart of the diff of every step and its threshold."""
    finite = [d for d in (*entry.compared.values(), *entry.thresholds.values()) if math.isfinite(d)]
    axes = _per_step(entry, 1.03 * max(finite, default=1.0))
    return axes.svg(_diffs(entry, axes), f"Diff per step, {_counts(entry)}")


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
    thresholds = sorted(entry.thresholds.items())
    if not thresholds:
        return
    half = abs(axes.x(0.5) - axes.x(0))
    stairs = [(axes.x(step) + side, axes.y(value)) for step, value in thresholds for side in (-half, half)]
    yield tag("polyline", points=points(*stairs), class_="threshold")


def time_chart(entry: CacheStats) -> str:
    """Returns a chart of the time of every step; empty if no times were measured."""
    seconds = list(entry.step_seconds)
    if not seconds:
        return ""
    axes = _per_step(entry, 1e3 * longest_shown(entry))
    return axes.svg(_times(entry, axes, seconds), f"Time per step, {_counts(entry)}")


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
    axes = _per_step(entry, 1.03 * max(values, default=1.0))
    return axes.svg(_errors(entry, axes), f"Error of reusing, per step, {_counts(entry)}")


def _errors(entry: CacheStats, axes: Frame) -> Iterator[str]:
    yield from axes.rows("error (relative L2)")
    yield from axes.columns("step", step_ticks(entry.num_steps))
    roles = list(dict.fromkeys(role for error in entry.errors.values() for role in error.streams))
    for number, role in enumerate(roles):
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
    present = [value for value in entry.thresholds.values() if math.isfinite(value)]
    high = 1.03 * max(one.error for one in steps)
    axes = frame((0.0, 1.06 * max(*(one.diff for one in steps), *present, 1e-9)), high)
    return axes.svg(_scatter(entry, axes), f"Error against diff of {len(steps)} steps")


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
    for value in sorted(set(entry.thresholds.values()))[:1]:
        x = axes.x(value)
        yield tag("line", x1=x, y1=axes.y.start, x2=x, y2=axes.y.stop, class_="threshold")
        near_end = x > axes.x.stop - 110
        place = (x - 5, "end") if near_end else (x + 5, "start")
        yield text(
            place[0], axes.y.stop + 9, f"threshold {value:.3g}", "threshold-name", "end" if near_end else "start"
        )
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


def _per_step(entry: CacheStats, high: float) -> Frame:
    return frame((-0.6, max(0.6, entry.num_steps - 0.4)), high)


def _counts(entry: CacheStats) -> str:
    return f"{len(entry.cached_steps)} of {entry.num_steps} steps reused"


def _decision(entry: CacheStats, step: int) -> str:
    return "reused" if step in entry.cached_steps else "computed"


def _reason(entry: CacheStats, step: int) -> str:
    return entry.decisions[step] if step < len(entry.decisions) else ""
