"""The search: from what the model of the errors says is best to what measures best, while the budget lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.schedule import NUM_FIRST, Problem, Schedule, best_schedules, cost_of
from cachedit_fx.tuning.targets import Budget, Target

_WEIGHED = (0.0, 0.12, 0.25, 0.42, 0.6, 0.8)  # Where in a generation the gain of an error is measured.
_WEIGHED_SHARE = 0.25  # Of the budget, at the most, for that.
_POLISH_DB = 3.0  # How far from the target one step less may be to be worth more runs.
_NEIGHBOURS = 6  # Of a schedule, the most promising, that are measured at the most.


@dataclass(frozen=True)
class Pace:
    """Seconds that a speed-up is reckoned from: of a generation uncached, and of its model's steps."""

    generation: float
    step: float
    num_steps: int

    def speedup(self, share_computed: float) -> float:
        """Where a reused step costs nothing beside what the pipeline does anyway."""
        saved = self.step * self.num_steps * (1 - share_computed)
        return self.generation / max(self.generation - saved, 1e-9)


@dataclass
class Search:
    """Schedules by the number of steps that they compute, and what was measured of them.

    Attributes:
        problems: The recorded generations, with the positions of "step" and "timestep".
        told: Called with a line after every measurement.
    """

    problems: Mapping[str, Sequence[Problem]]
    forecasters: Sequence[LinearForecaster]
    meter: Meter
    target: Target
    budget: Budget
    pace: Pace
    told: Callable[[str], None] = lambda line: None
    tables: list[dict[int, Schedule]] = field(default_factory=list)
    found: dict[Schedule, Measured] = field(default_factory=dict)

    def run(self) -> None:
        """Fills `found`. At least one schedule is measured, whatever the budget."""
        self._weigh()
        self.tables = [best_schedules(self.problems[f.by], f) for f in self.forecasters]
        if self.target.kind == "speedup":
            count = self._most_for_speedup()
            for schedule in self._ranked(count)[:3]:
                self._measure(schedule)
            self._polish(count)
            return
        count = self._bracket()
        while count - 1 in self.counts and not self.budget.is_over:
            if self._reaches(count - 1) or not self._is_near(count - 1):
                break
            self._polish(count - 1, until_reached=True)
            if not self._reaches(count - 1):
                break
            count -= 1
        self._polish(count)

    @property
    def counts(self) -> list[int]:
        """Numbers of computed steps for which there is a schedule."""
        return sorted({count for table in self.tables for count in table})

    def is_reached(self, measured: Measured) -> bool:
        """Whether the target is met with the margin."""
        factor = 10 ** (measured.margin_db / 20)
        if self.target.kind == "psnr":
            return measured.psnr - measured.margin_db >= self.target.value
        if self.target.kind == "rel_l2":
            return measured.rel_l2 * factor <= self.target.value
        return self.pace.speedup(measured.share_computed) >= self.target.value

    def best(self) -> tuple[Schedule, Measured] | None:
        """Of those that reach the target, the fastest, and of these the best; else the best of all."""
        if not self.found:
            return None
        reaching = [pair for pair in self.found.items() if self.is_reached(pair[1])]
        if self.target.kind == "speedup" or not reaching:
            return max(reaching or self.found.items(), key=lambda pair: pair[1].psnr)
        return min(reaching, key=lambda pair: (pair[1].share_computed, -pair[1].psnr))

    def expected(self) -> list[tuple[Schedule, float]]:
        """For every number of steps of which nothing was measured, the best schedule and its PSNR as predicted, dB."""
        counts = {len(schedule.computed) for schedule in self.found}
        left = (self._ranked(count)[0] for count in self.counts if count not in counts)
        return [(schedule, self._shifted(schedule, lambda m: m.psnr)) for schedule in left]

    # Choosing what to measure.

    def _weigh(self) -> None:
        """Measures what becomes of errors: schedules with a single gap, here and there, held against their cost."""
        forecaster, num_steps = self.forecasters[0], self.pace.num_steps
        problems, gap = self.problems[forecaster.by], max(1, num_steps // 9)
        starts = sorted({max(NUM_FIRST, round(part * num_steps)) for part in _WEIGHED})
        known: list[tuple[float, float]] = []
        for start in starts:
            computed = tuple(step for step in range(num_steps) if not start <= step < start + gap)
            cost = cost_of(problems, forecaster, computed)
            if self.budget.share_used > _WEIGHED_SHARE or len(computed) == num_steps:
                break
            measured = self._simulated(Schedule(forecaster, computed, num_steps, cost))
            if cost > 0 and (error := sum(measured.errors)) > 0:
                known.append((start + (gap - 1) / 2, math.log(error / cost)))
        if not known:
            return
        at, logs = zip(*known, strict=True)
        # Relative to their mean: PSNR is told by measurements, so that only the ratios count.
        gains = np.exp(np.interp(np.arange(num_steps), at, logs) - np.mean(logs))
        self.problems = {by: [replace(p, gains=gains) for p in each] for by, each in self.problems.items()}

    def _bracket(self) -> int:
        """The smallest number of steps whose best schedule reaches the target, by few measurements."""
        counts = self.counts
        fails, reaches = counts[0] - 1, counts[-1] + 1
        count = counts[min(len(counts) - 1, len(counts) // 4)]
        while True:
            self._measure(self._ranked(count)[0])
            if self._reaches(count):
                reaches = count
            else:
                fails = count
            if reaches - fails <= 1 or self.budget.share_used > 0.5:
                return min(reaches, counts[-1])
            count = self._guess(fails, reaches)

    def _guess(self, fails: int, reaches: int) -> int:
        between = [count for count in self.counts if fails < count < reaches]
        likely = [count for count in between if self._shortfall(self._ranked(count)[0]) <= 0]
        return likely[0] if likely else between[-1] if len(between) < 3 else between[len(between) // 2]

    def _shortfall(self, schedule: Schedule) -> float:
        """How many dB a schedule that is not measured is expected to lack."""
        if self.target.kind == "psnr":
            return self.target.value - self._shifted(schedule, lambda m: m.psnr - m.margin_db)
        wanted = -20 * math.log10(self.target.value)
        return wanted - self._shifted(schedule, lambda m: -20 * math.log10(max(m.rel_l2, 1e-12)) - m.margin_db)

    def _shifted(self, schedule: Schedule, value: Callable[[Measured], float]) -> float:
        """A measured value in dB, moved by what the model of the errors says of the difference."""
        known = [(s, m) for s, m in self.found.items() if s.cost > 0 and s.num_steps == schedule.num_steps]
        if not known or schedule.cost <= 0:
            return math.nan if not known else math.inf
        count = len(schedule.computed)
        nearest, measured = min(known, key=lambda pair: (abs(len(pair[0].computed) - count), -pair[1].psnr))
        return value(measured) + 10 * math.log10(nearest.cost / schedule.cost)

    def _ranked(self, count: int) -> list[Schedule]:
        """Every forecaster's schedule with so many steps, the one with the smallest modelled error first."""
        found: dict[object, Schedule] = {}
        for table in self.tables:
            if (schedule := table.get(count)) is not None:
                # Where the timestep moves evenly, two that differ in what positions are told by are one.
                kind = replace(schedule.forecaster, by="step")
                found.setdefault((kind, schedule.computed, float(f"{schedule.cost:.6g}")), schedule)
        return sorted(found.values(), key=lambda schedule: schedule.cost)

    def _most_for_speedup(self) -> int:
        steps = self.pace.num_steps
        enough = [count for count in self.counts if self.pace.speedup(count / steps) >= self.target.value]
        return enough[-1] if enough else self.counts[0]

    # Measuring.

    def _measure(self, schedule: Schedule) -> Measured:
        if schedule not in self.found:
            self.found[schedule] = measured = self._simulated(schedule)
            self.told(f"{len(schedule.computed)} of {schedule.num_steps} steps: PSNR {measured.psnr:.1f} dB")
        return self.found[schedule]

    def _simulated(self, schedule: Schedule) -> Measured:
        self.budget.used += not self.meter.is_known(schedule.key)
        return self.meter.simulation(schedule)

    def _reaches(self, count: int) -> bool:
        return any(self.is_reached(m) for s, m in self.found.items() if len(s.computed) == count)

    def _best_of(self, count: int) -> Schedule | None:
        known = [(m.psnr, i, s) for i, (s, m) in enumerate(self.found.items()) if len(s.computed) == count]
        return max(known)[2] if known else None

    def _is_near(self, count: int) -> bool:
        best = self._best_of(count)
        schedule = best or self._ranked(count)[0]
        return self._shortfall(schedule) < _POLISH_DB

    def _polish(self, count: int, *, until_reached: bool = False) -> None:
        """Other forecasters, then one step moved at a time, from the best one on, until nothing is better."""
        for schedule in self._ranked(count)[:3]:
            if self.budget.is_over or (until_reached and self._reaches(count)):
                return
            self._measure(schedule)
        while (best := self._best_of(count)) is not None:
            before = self.found[best].psnr
            for neighbour in self._neighbours(best):
                if self.budget.is_over or (until_reached and self._reaches(count)):
                    return
                if self._measure(neighbour).psnr > before:
                    break
            else:
                return

    def _neighbours(self, schedule: Schedule) -> list[Schedule]:
        """One step earlier or later, those with the smallest modelled error first."""
        moved = [s for s in _moves(schedule, self.problems[schedule.forecaster.by]) if s not in self.found]
        return sorted(moved, key=lambda s: s.cost)[:_NEIGHBOURS]


def _moves(schedule: Schedule, problems: Sequence[Problem]) -> Iterator[Schedule]:
    for index in range(NUM_FIRST, len(schedule.computed)):
        for way in (-1, 1):
            steps = list(schedule.computed)
            steps[index] += way
            if len({*steps}) == len(steps) and NUM_FIRST <= steps[index] < schedule.num_steps:
                cost = cost_of(problems, schedule.forecaster, steps)
                yield Schedule(schedule.forecaster, tuple(steps), schedule.num_steps, cost)
