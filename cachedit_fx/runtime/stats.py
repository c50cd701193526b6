"""What a session did, as numbers and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cachedit_fx.runtime.call_counts import CallCounts

_PERCENTILES = {"Min": 0, "P25": 25, "P50": 50, "P75": 75, "P95": 95, "Max": 100}
_HEADER = ("Cache Steps", *(f"Diffs {name}" for name in _PERCENTILES), "Steps", "Region", "Session")
_STEP_HEADER = ("Step", "Decision", "Reason", "Diff", "Region", "Session")

Row = tuple[str, ...]


# Reasons of decisions by a sum of several steps (`policies.budget`, `policies.magnitude`).
_OF_SUMS = frozenset({"budget-below", "budget-above", "ratios-below", "ratios-above", "ratios-end"})


@dataclass(frozen=True, slots=True)
class StepError:
    """How far a reused step would have been from the computed one (shadow mode): relative L2, dimensionless.

    |reused - computed| / |computed|, over all elements, in float32.

    Attributes:
        reused: Whether the region would have been reused at this step. Where no region would have been, it is said how
            far off it would have been to reuse all of them.
        streams: Of what leaves the region, by role.
        output: Of all floating tensors that the model returns, together.
    """

    reused: bool
    streams: dict[str, float]
    output: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One region of one session.

    Attributes:
        region: Its blocks, as in `transformer_blocks[1:]`.
        session: The request's name, if it has one, and the guidance branch: its label, or the number of its
            conditioning.
        num_steps: Steps so far.
        cached_steps: Numbers of the steps that were reused, from 0.
        residual_diffs: Step -> relative L1 distance, dimensionless; only steps whose decision looked at it.
        decisions: Per step the reason: "warmup", "diff-below", "diff-above", ... (see `policies.decide`).
        state_bytes: What the session holds now; 0 once it is finished.
        peak_state_bytes: What it held at its last step.
        module: The pipeline's name for the transformer; empty where a transformer was asked itself.
        began: Why a session began: "new" (another request, guidance branch or prompt, or another of a step's calls),
            "new-schedule" (the pipeline was called anew), "timestep-turned", "conditioning-changed" (another prompt was
            written into the same tensor), "length-reached", or "state-dropped" (the generation goes on, but what it had
            kept was dropped: see `bound`).
        timesteps: Per step; None where the model has none.
        thresholds: Step -> what its diff, or with decision_rule "budget" its accumulated diff, was held against; only
            steps whose decision looked at one.
        step_seconds: Per step, for the whole model: wall time on a CPU, on an accelerator that between two events.
        errors: Step -> how far off it would have been to reuse; shadow mode only, and only where something was kept.
        accumulated: Step -> the diffs since the last computed step, with this one's; only steps that added one. From
            `magnitude_ratios`, these are the errors that they foretell.
        not_forecast: Numbers of the reused steps that repeated the last residual, for a stream or a sample at least,
            though there is a forecaster: it did no better at the last computed step, there are too few values, or a
            gap or a jump came after them. Read from the device when it is asked for.
        bound: What the bounds on all that is kept did to the session: "dropped-bytes" (`max_state_bytes`) or
            "dropped-number" (64 sessions) if it was dropped, "kept-over" if its generation alone keeps more than
            `max_state_bytes` and runs; else empty.
        num_dropped: Sessions of the module that were dropped before, for either reason.
    """

    region: str
    session: str
    num_steps: int
    cached_steps: list[int] = field(default_factory=list)
    residual_diffs: dict[int, float] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    state_bytes: int = 0
    peak_state_bytes: int = 0
    module: str = ""
    began: str = "new"
    timesteps: list[float | None] = field(default_factory=list)
    thresholds: dict[int, float] = field(default_factory=dict)
    step_seconds: Sequence[float] = field(default_factory=list)
    errors: dict[int, StepError] = field(default_factory=dict)
    accumulated: dict[int, float] = field(default_factory=dict)
    not_forecast: Sequence[int] = field(default_factory=list)
    bound: str = ""
    num_dropped: int = 0

    @property
    def compared(self) -> dict[int, float]:
        """Step -> what was held against the threshold: the diff, or under the rule "budget" what had accumulated."""
        return self.accumulated if self.adds_up else self.residual_diffs

    @property
    def adds_up(self) -> bool:
        """Whether the decisions are by sums: then no threshold alone tells which steps it would reuse."""
        return not _OF_SUMS.isdisjoint(self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        read = dataclasses.replace(self, step_seconds=list(self.step_seconds), not_forecast=list(self.not_forecast))
        return dataclasses.asdict(read)

    def _repr_html_(self) -> str | None:
        return Summary([self])._repr_html_()

    def __str__(self) -> str:
        return str(Summary([self]))


class Summary(list[CacheStats]):
    """A list of statistics that prints as one table, a line each; with `details` a second one, a line per step.

    Attributes:
        calls: How the calls of every transformer that the cache is enabled for were served, by its name; empty for one
            that was asked itself.
        notes: What there is to say besides: why nothing was reused, what was dropped, or why a model that
            `torch.compile` was given runs without the cache. A sentence each.
    """

    def __init__(
        self,
        stats: Iterable[CacheStats] = (),
        *,
        title: str = "",
        details: bool = False,
        calls: Mapping[str, CallCounts] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(stats)
        self.title = title
        self.details = details
        self.calls = dict(calls or {})
        self.notes = list(notes)

    @property
    def lines(self) -> list[str]:
        """What stands below the first table: how the calls were served, then the notes."""
        served = [f"{name or self.title}: {counts}" for name, counts in self.calls.items()]
        return [*served, *self.notes]

    @property
    def tables(self) -> list[list[Row]]:
        """The tables, each a header and its rows."""
        first = [_HEADER, *map(_summary_row, self)]
        return (
            [first, [_STEP_HEADER, *(row for entry in self for row in _step_rows(entry))]] if self.details else [first]
        )

    def _repr_html_(self) -> str | None:
        return html_renderer(self) if html_renderer is not None else None

    def __str__(self) -> str:
        if not self and not self.lines:
            return "no session has run yet"
        head = [f"Cache Steps and Residual Diffs Statistics: {self.title}"] if self.title and self else []
        first, *others = map(_markdown, self.tables) if self else [""]
        return "\n\n".join(filter(None, [*head, first, "\n".join(self.lines), *others]))


# What draws statistics in a notebook. `cachedit_fx.inspect.reports` puts it here: nothing imports what renders.
html_renderer: Callable[[Summary], str] | None = None


def _summary_row(entry: CacheStats) -> Row:
    diffs = [d for d in entry.residual_diffs.values() if np.isfinite(d)]
    marks = [f"{q:.3f}" for q in np.percentile(diffs, [*_PERCENTILES.values()])] if diffs else ["-"] * len(_PERCENTILES)
    return (str(len(entry.cached_steps)), *marks, str(entry.num_steps), _place(entry), entry.session)


def _step_rows(entry: CacheStats) -> list[Row]:
    cached, not_forecast = set(entry.cached_steps), set(entry.not_forecast)
    return [
        (
            str(step),
            "reuse (last)" if step in not_forecast else "reuse" if step in cached else "compute",
            reason,
            f"{entry.residual_diffs[step]:.3f}" if step in entry.residual_diffs else "-",
            _place(entry),
            entry.session,
        )
        for step, reason in enumerate(entry.decisions)
    ]


def _place(entry: CacheStats) -> str:
    return f"{entry.module}.{entry.region}" if entry.module else entry.region


def _markdown(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
