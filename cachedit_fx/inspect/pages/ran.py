"""Writes the HTML page of a `RunReport`, and the display of statistics in a notebook."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from cachedit_fx.inspect.explanation.units import size
from cachedit_fx.inspect.pages.charts import diff_chart, error_chart, mark, scatter_chart, spark, time_chart
from cachedit_fx.inspect.pages.render import asset, render
from cachedit_fx.inspect.pages.svg import tag
from cachedit_fx.inspect.pages.thresholds import Candidate, candidates
from cachedit_fx.inspect.pages.words import why, why_began
from cachedit_fx.runtime.stats import CacheStats, Summary


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step as a row of a table. Unknown values are "–"."""

    step: int
    timestep: str
    is_reused: bool
    diff: str
    threshold: str
    seconds: str
    error: str
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class Times:
    """Median times of the computed and of the reused steps, with units; None if there is no such step.

    Attributes:
        computed: The median time of a computed step.
        reused: The median time of a reused step.
        ratio: The ratio of the two medians.
    """

    computed: str | None
    reused: str | None
    ratio: float | None

    @classmethod
    def of(cls, entries: Sequence[CacheStats]) -> Times:
        computed: list[float] = []
        reused: list[float] = []
        for entry in entries:
            cached = set(entry.cached_steps)
            for step, second in enumerate(entry.step_seconds):
                (reused if step in cached else computed).append(second)
        slow = statistics.median(computed) if computed else None
        fast = statistics.median(reused) if reused else None
        return cls(duration(slow), duration(fast), slow / fast if slow and fast else None)


@dataclass(frozen=True, slots=True)
class EntryView:
    """The data of one region of one session for the HTML template."""

    entry: CacheStats
    name: str
    began: str
    times: Times
    rows: list[StepRow]
    choices: list[Candidate]
    charts: dict[str, str]


def run_page(title: str, stats: Summary) -> str:
    """Returns the page as HTML that loads nothing from the network.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    views = [_view(entry) for entry in stats]
    return render(
        "run.html.j2",
        title=f"run: {title}",
        heading=title,
        stats=stats,
        verdict=verdict_line(stats),
        views=views,
        is_shadow=is_shadow(stats),
        reused=sum(len(entry.cached_steps) for entry in stats),
        total=sum(entry.num_steps for entry in stats),
        sessions=num_sessions(stats),
        times=Times.of(stats),
        state_bytes=sum(entry.state_bytes for entry in stats),
        peak_state_bytes=sum(entry.peak_state_bytes for entry in stats),
    )


def run_fragment(stats: Summary) -> str:
    """Returns HTML for a notebook: a row with a small chart for every entry. It needs neither scripts nor jinja2."""
    below = "".join(f"<div>{escape(line)}</div>" for text in stats.lines for line in text.splitlines())
    if not stats:
        return f"<div>{below or 'no session has run yet'}</div>"
    heads = (
        "Session",
        "Region",
        "Steps reused",
        "Diff per step",
        "Computed (median)",
        "Reused (median)",
        "Cached",
    )
    lines = ["".join(f'<th style="text-align:left">{head}</th>' for head in heads)]
    for entry in stats:
        times = Times.of([entry])
        cells = [escape(entry.session), f"<code>{escape(place(entry))}</code>"]
        cells += [f"{len(entry.cached_steps)} of {entry.num_steps}", spark(entry), times.computed or "–"]
        cells += [times.reused or "–", size(entry.peak_state_bytes)]
        lines.append("".join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    head = f"<strong>{escape(stats.title)}</strong> {escape(verdict_line(stats))}"
    marks = f"{_legend_mark(False)} computed {_legend_mark(True)} reused"
    style = f"<style>{asset('chart.css')}</style>"
    return f'<div class="cachedit-fx">{style}<div>{head}</div><table>{rows}</table><div>{marks}</div>{below}</div>'


def verdict_line(stats: Sequence[CacheStats]) -> str:
    """Returns one sentence that states what a run did."""
    if not stats:
        return _without_sessions(stats)
    reused, total = sum(len(entry.cached_steps) for entry in stats), sum(entry.num_steps for entry in stats)
    sessions = num_sessions(stats)
    where = f"{sessions} session{'s' * (sessions != 1)}"
    share = reused / total if total else 0.0
    if is_shadow(stats):
        return f"Shadow mode: all steps computed; {reused} of {total} in {where} ({share:.0%}) would have been reused."
    counts = f"{reused} of {total} steps in {where} were reused ({share:.0%})"
    times = Times.of(stats)
    if times.ratio is None:
        return f"{counts}."
    return (
        f"{counts}; a computed step took {times.computed}, a reused step {times.reused}: "
        f"{times.ratio:.2f} times as fast."
    )


def _without_sessions(stats: Sequence[CacheStats]) -> str:
    if not isinstance(stats, Summary) or not stats.lines:
        return "No session has run yet."
    if not stats.calls:
        return "The model runs without the cache."
    uncached = sum(counts.uncached + counts.bypassed for counts in stats.calls.values())
    return f"All {uncached} calls ran without the cache." if uncached else "The model has not been called yet."


def is_shadow(stats: Sequence[CacheStats]) -> bool:
    """Returns whether errors were measured, which only shadow mode does."""
    return any(entry.errors for entry in stats)


def num_sessions(stats: Sequence[CacheStats]) -> int:
    """Returns the number of sessions of the entries. A session has one entry for each of its regions."""
    regions: dict[tuple[str, str], int] = {}
    for entry in stats:
        regions[entry.module, entry.region] = regions.get((entry.module, entry.region), 0) + 1
    most: dict[str, int] = {}
    for (module, _), count in regions.items():
        most[module] = max(most.get(module, 0), count)
    return sum(most.values())


def place(entry: CacheStats) -> str:
    """Returns the name of the region, preceded by that of its transformer if it has one."""
    return f"{entry.module}.{entry.region}" if entry.module else entry.region


def duration(seconds: float | None) -> str | None:
    """Formats a duration, such as `12.3 ms`."""
    if seconds is None:
        return None
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


def _view(entry: CacheStats) -> EntryView:
    charts = {
        "diff": diff_chart(entry),
        "time": time_chart(entry),
        "error": error_chart(entry),
        "scatter": scatter_chart(entry),
    }
    return EntryView(
        entry=entry,
        name=place(entry),
        began=why_began(entry.began),
        times=Times.of([entry]),
        rows=list(_rows(entry)),
        choices=candidates(entry),
        charts=charts,
    )


def _rows(entry: CacheStats) -> Iterator[StepRow]:
    reused, seconds = set(entry.cached_steps), list(entry.step_seconds)
    for step, reason in enumerate(entry.decisions):
        error = entry.errors.get(step)
        timestep = entry.timesteps[step] if step < len(entry.timesteps) else None
        yield StepRow(
            step=step,
            timestep=_number(timestep, 4),
            is_reused=step in reused,
            diff=_number(entry.residual_diffs.get(step), 3),
            threshold=_number(entry.thresholds.get(step), 3),
            seconds=duration(seconds[step] if step < len(seconds) else None) or "–",
            error=_number(error.output if error is not None else None, 3),
            reason=reason,
            why=why(reason),
        )


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if math.isfinite(value) else "∞" if value > 0 else "not a number"


def _legend_mark(is_reused: bool) -> str:
    box = dict(viewBox="0 0 16 16", width="16", height="16", class_="ch", aria_hidden="true")
    return tag("svg", mark(8, 8, is_reused), **box)
