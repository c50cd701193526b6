"""The statistics of sessions, as numbers and as tables."""

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
    """The error that reusing would have caused at a step (shadow mode): relative L2, dimensionless.

    |reused - computed| / |computed|, over all elements, in float32.

    Attributes:
        reused: Whether the region would have been reused at this step. If no region would have been, the errors are
            those of reusing all regions.
        streams: The errors of the live-outs of the region, by role.
        output: The error of all floating-point tensors that the model returns, together.
    """

    reused: bool
    streams: dict[str, float]
    output: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The statistics of one region in one session.

    Attributes:
        region: The blocks of the region: `transformer_blocks[1:]`.
        session: The name of the request, if it has one, and the guidance branch: its label, or the number of its
            conditioning.
        num_steps: The number of steps.
        cached_steps: The numbers of the reused steps, starting at 0. They include `guided_steps`.
        residual_diffs: Step -> residual diff (relative L1, dimensionless), for the steps whose decision used it.
        decisions: The reason of the decision at every step: "warmup", "diff-below", "diff-above", ... (see
            `policies.decide`).
        state_bytes: The size of the cached values in bytes; 0 once the session is finished.
        peak_state_bytes: The size of the cached values after the last step, in bytes.
        module: The pipeline's name for the transformer; empty if the statistics are those of a transformer itself.
        began: Why the session began: "new" (another request, guidance branch, prompt or ordinal), "new-schedule" (a new
            call of the pipeline), "timestep-turned", "conditioning-changed" (another prompt was written into the same
            tensor), "length-reached", or "state-dropped" (the generation continues after its cached values were
            dropped; see `bound`).
        timesteps: The timestep at every step; None if the model has none.
        thresholds: Step -> the threshold that the residual diff (with decision_rule "budget", the accumulated diff) was
            compared with, for the steps whose decision used one.
        step_seconds: The duration of every step of the whole model in seconds: wall time on a CPU, or the time between
            two events on an accelerator.
        errors: Step -> the error that reusing would have caused. Only in shadow mode, and only if values were cached.
        accumulated: Step -> the sum of the residual diffs since the last computed step, including this one, for the
            steps that added one. With `magnitude_ratios`, the sum of the errors that they predict.
        not_forecast: The numbers of the reused steps that repeated the last residual, for at least one stream or
            sample, although there is a forecaster: its forecast was no better at the last computed step, there were too
            few values, or they were followed by a gap or a jump. Read from the device at the first access.
        bound: The effect of the bounds on the memory of all sessions: "dropped-bytes" (`max_state_bytes`) or
            "dropped-number" (64 sessions) if the session was dropped, "kept-over" if its running generation alone
            exceeds `max_state_bytes`; otherwise empty.
        num_dropped: The number of sessions of the module that were dropped before.
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
    def guided_steps(self) -> list[int]:
        """The numbers of the reused steps that followed another guidance branch (`guidance_reuse`)."""
        return [step for step, reason in enumerate(self.decisions) if reason == "guidance"]

    @property
    def compared(self) -> dict[int, float]:
        """Step -> the value that was compared with the threshold: the diff or, with a budget, the accumulated diff."""
        return self.accumulated if self.adds_up else self.residual_diffs

    @property
    def adds_up(self) -> bool:
        """Whether sums of diffs are compared. Then the diffs do not show which steps another threshold would reuse."""
        return not _OF_SUMS.isdisjoint(self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
        read = dataclasses.replace(self, step_seconds=list(self.step_seconds), not_forecast=list(self.not_forecast))
        return dataclasses.asdict(read)

    def _repr_html_(self) -> str | None:
        return Summary([self])._repr_html_()

    def __str__(self) -> str:
        return str(Summary([self]))


class Summary(list[CacheStats]):
    """A list of statistics that prints as a table with one line each. With `details`, a second table has all steps.

    Attributes:
        calls: How the calls of every transformer with an enabled cache were served, by its name. The name is empty if
            the summary is that of a transformer itself.
        notes: Sentences for what else there is to report: why nothing was reused, what was dropped, or why a model that
            was passed to `torch.compile` runs without the cache.
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
        """The lines below the first table: how the calls were served, then the notes."""
        served = [f"{name or self.title}: {counts}" for name, counts in self.calls.items()]
        return [*served, *self.notes]

    @property
    def tables(self) -> list[list[Row]]:
        """The tables, each as a header followed by rows."""
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


# Draws statistics in a notebook. `cachedit_fx.inspect.reports` sets it, since this module must not import it.
html_renderer: Callable[[Summary], str] | None = None


def _summary_row(entry: CacheStats) -> Row:
    diffs = [d for d in entry.residual_diffs.values() if np.isfinite(d)]
    marks = [f"{q:.3f}" for q in np.percentile(diffs, [*_PERCENTILES.values()])] if diffs else ["-"] * len(_PERCENTILES)
    guided = f" ({len(entry.guided_steps)} by guidance)" if entry.guided_steps else ""
    return (f"{len(entry.cached_steps)}{guided}", *marks, str(entry.num_steps), _place(entry), entry.session)


def _step_rows(entry: CacheStats) -> list[Row]:
    cached, not_forecast = set(entry.cached_steps), set(entry.not_forecast)
    return [
        (
            str(step),
            _decision(step, entry, cached, not_forecast),
            reason,
            f"{entry.residual_diffs[step]:.3f}" if step in entry.residual_diffs else "-",
            _place(entry),
            entry.session,
        )
        for step, reason in enumerate(entry.decisions)
    ]


def _decision(step: int, entry: CacheStats, cached: set[int], not_forecast: set[int]) -> str:
    if entry.decisions[step] == "guidance":
        return "reuse (guidance)"
    return "reuse (last)" if step in not_forecast else "reuse" if step in cached else "compute"


def _place(entry: CacheStats) -> str:
    return f"{entry.module}.{entry.region}" if entry.module else entry.region


def _markdown(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
