"""Searches for the best schedule: measures those with the smallest predicted error while the budget lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.tuning.guided import guided_schedules
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.schedule import NUM_FIRST, Problem, Schedule, best_schedules, cost_of
from cachedit_fx.tuning.targets import Budget, Target

_GAIN_PLACES = (0.0, 0.12, 0.25, 0.42, 0.6, 0.8)  # Where the gain of an error is measured, as parts of a generation.
_GAIN_SHARE = 0.25  # The largest share of the budget that measuring the gains may use.
_STEPS_SHARE = 0.6  # The largest share of the budget for other numbers of steps, if guided steps can be tried,
_MOVES_SHARE = 0.8  # and the largest share up to the point where they are.
_POLISH_DB = 3.0  # One step less is tried further if it misses the target by less than this.
_GUIDED_DB = 1.5  # A schedule with guided steps is measured if it is predicted to miss the target by less than this.
_NEIGHBORS = 6  # The largest number of neighbors of a schedule that are measured.


@dataclass(frozen=True)
class Pace:
    """The times without the cache, from which speed-ups are computed.

    Attributes:
        generation: Seconds of a generation.
        step: Seconds of the model at one step.
        num_steps: The number of steps of a generation.
    """

    generation: float
    step: float
    num_steps: int

    def speedup(self, share_computed: float) -> float:
        """Returns the speed-up of a generation if a reused step takes no time in the model."""
        saved = self.step * self.num_steps * (1 - share_computed)
        return self.generation / max(self.generation - saved, 1e-9)


@dataclass
class Search:
    """Searches for the schedule with the fewest computed steps that reaches a target, and for the best one with these.

    Attributes:
        problems: The problems of the recorded runs, for positions by "step" and by "timestep".
        forecasters: The forecasters to try.
        meter: Runs the calls with a schedule.
        target: The target to reach.
        budget: The limit on measurements.
        pace: The times without the cache.
        report: Called with a line after every measurement.
        tables: For each forecaster, the best schedule for every number of computed steps.
        found: The measured schedules.
    """

    problems: Mapping[str, Sequence[Problem]]
    forecasters: Sequence[LinearForecaster]
    meter: Meter
    target: Target
    budget: Budget
    pace: Pace
    report: Callable[[str], None] = lambda line: None
    tables: list[dict[int, Schedule]] = field(default_factory=list)
    found: dict[Schedule, Measured] = field(default_factory=dict)

    def run(self) -> None:
        """Runs the search and fills `found`. At least one schedule is measured, whatever the budget."""
        self._measure_gains()
        self.tables = [best_schedules(self.problems[f.by], f) for f in self.forecasters]
        if self.target.kind == "speedup":
            count = self._most_for_speedup()
            for schedule in self._ranked(count)[:3]:
                self._measure(schedule)
            fast = {share: each for share, each in self._guided_near(count).items() if self._is_fast(share)}
            if fast and not self.budget.is_over:
                self._measure(fast[max(fast)][0])
            self._polish(count)
            return
        count = self._bracket()
        # The rest of the budget is for guided steps, which may save a part of a step.
        limit = _STEPS_SHARE if self._has_guidance else 1.0
        while count - 1 in self.counts and self.budget.share_used < limit:
            if self._reaches(count - 1) or not self._is_near(count - 1):
                break
            self._polish(count - 1, until_reached=True, limit=limit)
            if not self._reaches(count - 1):
                break
            count -= 1
        self._polish(count, limit=_MOVES_SHARE if self._has_guidance else 1.0)
        if not self._try_guided(count):
            self._polish(count)

    def run_near(self, count: int) -> None:
        """Runs a short search that begins with a number of computed steps, and fills `found`.

        It measures the best schedule with this number, then with less while the target is reached, or with more until
        it is. For a target speed-up, it measures the best schedules that are fast enough.
        """
        self.tables = [best_schedules(self.problems[f.by], f) for f in self.forecasters]
        if self.target.kind == "speedup":
            for schedule in self._ranked(self._most_for_speedup()):
                if self.budget.is_over:
                    return
                self._measure(schedule)
            return
        tried: set[int] = set()
        count = min(max(count, self.counts[0]), self.counts[-1])
        while count in self.counts and count not in tried and not self.budget.is_over:
            tried.add(count)
            count += -1 if self.is_reached(self._measure(self._ranked(count)[0])) else 1

    @property
    def counts(self) -> list[int]:
        """The numbers of computed steps for which there is a schedule, in ascending order."""
        return sorted({count for table in self.tables for count in table})

    def is_reached(self, measured: Measured) -> bool:
        """Returns whether a measurement reaches the target, including the margin."""
        if self.target.kind == "psnr":
            return measured.psnr - measured.margin_db >= self.target.value
        if self.target.kind == "rel_l2":
            return measured.rel_l2 + measured.margin_rel_l2 <= self.target.value
        return self.pace.speedup(measured.share_computed) >= self.target.value

    def best(self) -> tuple[Schedule, Measured] | None:
        """Returns the best measured schedule; None if nothing was measured.

        This is the fastest schedule that reaches the target, and of equally fast ones the one with the highest PSNR.
        For a target speed-up, or if none reaches the target, it is the schedule with the highest PSNR.
        """
        if not self.found:
            return None
        reaching = [pair for pair in self.found.items() if self.is_reached(pair[1])]
        if self.target.kind == "speedup" or not reaching:
            return max(reaching or self.found.items(), key=lambda pair: pair[1].psnr)
        return min(reaching, key=lambda pair: (pair[1].share_computed, -pair[1].psnr))

    def expected(self) -> list[tuple[Schedule, float]]:
        """Returns the best schedule and its predicted PSNR in dB for every number of steps that was not measured."""
        counts = {len(schedule.computed) for schedule in self.found if not schedule.guided}
        left = (self._ranked(count)[0] for count in self.counts if count not in counts)
        return [(schedule, self._shifted(schedule, lambda m: m.psnr)) for schedule in left]

    # Choosing what to measure.

    def _measure_gains(self) -> None:
        """Measures the gains of errors, from schedules with a single gap at several places of a generation."""
        forecaster, num_steps = self.forecasters[0], self.pace.num_steps
        problems, gap = self.problems[forecaster.by], max(1, num_steps // 9)
        first = problems[0].starts  # Of each transformer; these steps are always computed.
        log_gains: list[tuple[float, float]] = []
        for start in sorted({max(NUM_FIRST, round(part * num_steps)) for part in _GAIN_PLACES}):
            computed = tuple(step for step in range(num_steps) if step in first or not start <= step < start + gap)
            cost = cost_of(problems, forecaster, computed)
            if self.budget.share_used > _GAIN_SHARE:
                break
            if cost > 0:
                measured = self._simulated(Schedule(forecaster, computed, num_steps, cost, first))
                log_gains.append((start + (gap - 1) / 2, -measured.psnr * math.log(10) / 10 - math.log(cost)))
        if not log_gains:
            return
        at, logs = zip(*log_gains, strict=True)
        # Relative to their mean, because only the ratios of gains matter: the PSNR is measured.
        gains = np.exp(np.interp(np.arange(num_steps), at, logs) - np.mean(logs))
        self.problems = {by: [replace(p, gains=gains) for p in each] for by, each in self.problems.items()}

    def _bracket(self) -> int:
        """Finds the smallest number of steps whose best schedule reaches the target, with few measurements."""
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
        """Returns by how many dB a schedule is predicted to miss the target."""
        if self.target.kind == "psnr":
            return self.target.value - self._shifted(schedule, lambda m: m.psnr - m.margin_db)
        wanted = -20 * math.log10(self.target.value)
        return wanted - self._shifted(schedule, lambda m: -20 * math.log10(max(m.rel_l2 + m.margin_rel_l2, 1e-12)))

    def _shifted(self, schedule: Schedule, value: Callable[[Measured], float]) -> float:
        """Predicts a value in dB from the nearest measured schedule, by the ratio of the two costs."""
        pairs = [(s, m) for s, m in self.found.items() if s.cost > 0 and s.num_steps == schedule.num_steps]
        if not pairs or schedule.cost <= 0:
            return math.nan if not pairs else math.inf
        share = schedule.share_computed
        nearest, measured = min(pairs, key=lambda pair: (abs(pair[0].share_computed - share), -pair[1].psnr))
        return value(measured) + 10 * math.log10(nearest.cost / schedule.cost)

    def _ranked(self, count: int) -> list[Schedule]:
        """Returns the schedules of all forecasters with `count` computed steps, smallest predicted error first."""
        found: dict[object, Schedule] = {}
        for table in self.tables:
            if (schedule := table.get(count)) is not None:
                # With evenly spaced timesteps, forecasters that differ only in `by` are equal.
                kind = replace(schedule.forecaster, by="step")
                found.setdefault((kind, schedule.computed, float(f"{schedule.cost:.6g}")), schedule)
        return sorted(found.values(), key=lambda schedule: schedule.cost)

    def _most_for_speedup(self) -> int:
        enough = [count for count in self.counts if self._is_fast(count / self.pace.num_steps)]
        return enough[-1] if enough else self.counts[0]

    def _is_fast(self, share_computed: float) -> bool:
        return self.pace.speedup(share_computed) >= self.target.value

    # Guidance reuse.

    @property
    def _has_guidance(self) -> bool:
        """Whether a second guidance branch can follow the first one."""
        return all(problem.joint is not None for problem in self.problems["step"])

    def _guided_near(self, count: int) -> dict[float, list[Schedule]]:
        """Returns schedules with guided steps and about the share of `count` computed steps, by their share.

        Those of one share are sorted by their predicted error.
        """
        larger = [more for more in (count + 1, count + 2) if more in self.counts]
        bases = [self._best_of(count), *(self._ranked(more)[0] for more in larger)]
        found: dict[float, list[Schedule]] = {}
        for base in filter(None, bases):
            for schedule in guided_schedules(self.problems[base.forecaster.by], base):
                found.setdefault(schedule.share_computed, []).append(schedule)
        return {share: sorted(found[share], key=lambda schedule: schedule.cost) for share in found}

    def _try_guided(self, count: int) -> bool:
        """Looks for guided steps with which less than `count` computed steps reach the target; returns if there are."""
        is_better, best = False, self._best_of(count)
        if best is None or not best.cost or not self._reaches(count):
            return False
        by_share, shortfall = self._guided_near(count), self._shortfall(best)
        for share in sorted((s for s in by_share if s < best.share_computed), reverse=True):
            lost = {schedule: 10 * math.log10(schedule.cost / best.cost) for schedule in by_share[share][:2]}
            likely = [schedule for schedule in lost if shortfall + lost[schedule] < _GUIDED_DB]
            if not self._measures_one_that_reaches(likely):
                break
            is_better = True
        return is_better

    def _measures_one_that_reaches(self, schedules: Sequence[Schedule]) -> bool:
        for schedule in schedules:
            if self.budget.is_over:
                return False
            if self.is_reached(self._measure(schedule)):
                return True
        return False

    # Measuring.

    def _measure(self, schedule: Schedule) -> Measured:
        if schedule not in self.found:
            self.found[schedule] = measured = self._simulated(schedule)
            guided = f" ({len(schedule.guided)} by one guidance branch)" if schedule.guided else ""
            steps = f"{len(schedule.computed)} of {schedule.num_steps} steps computed{guided}"
            self.report(f"{steps}: PSNR {measured.psnr:.1f} dB")
        return self.found[schedule]

    def _simulated(self, schedule: Schedule) -> Measured:
        self.budget.spend(not self.meter.is_measured(schedule.key))
        return self.meter.simulation(schedule)

    def _reaches(self, count: int) -> bool:
        return any(self.is_reached(m) for s, m in self.found.items() if len(s.computed) == count and not s.guided)

    def _best_of(self, count: int) -> Schedule | None:
        found = [(m.psnr, i, s) for i, (s, m) in enumerate(self.found.items()) if not s.guided]
        measured = [each for each in found if len(each[2].computed) == count]
        return max(measured)[2] if measured else None

    def _is_near(self, count: int) -> bool:
        best = self._best_of(count)
        schedule = best or self._ranked(count)[0]
        return self._shortfall(schedule) < _POLISH_DB

    def _polish(self, count: int, *, until_reached: bool = False, limit: float = 1.0) -> None:
        """Improves the best schedule with `count` steps: tries other forecasters, then moves one step at a time."""
        for schedule in self._ranked(count)[:3]:
            if self.budget.share_used >= limit or (until_reached and self._reaches(count)):
                return
            self._measure(schedule)
        while (best := self._best_of(count)) is not None:
            before = self.found[best].psnr
            for neighbor in self._neighbors(best):
                if self.budget.share_used >= limit or (until_reached and self._reaches(count)):
                    return
                if self._measure(neighbor).psnr > before:
                    break
            else:
                return

    def _neighbors(self, schedule: Schedule) -> list[Schedule]:
        """Returns schedules with one step moved by one, smallest predicted error first."""
        moved = [s for s in _moves(schedule, self.problems[schedule.forecaster.by]) if s not in self.found]
        return sorted(moved, key=lambda s: s.cost)[:_NEIGHBORS]


def _moves(schedule: Schedule, problems: Sequence[Problem]) -> Iterator[Schedule]:
    for index in range(NUM_FIRST, len(schedule.computed)):
        for way in (-1, 1):
            steps = list(schedule.computed)
            steps[index] += way
            is_valid = NUM_FIRST <= steps[index] < schedule.num_steps and {*steps} >= {*schedule.starts}
            if len({*steps}) == len(steps) and is_valid:
                cost = cost_of(problems, schedule.forecaster, steps)
                yield replace(schedule, computed=tuple(steps), cost=cost)
