"""Measures what fewer steps reach, with the scheduler of the pipeline and with others: `AlternativeSearch`.

Every alternative is compared with the same reference as the cached configurations: what the calls return without the
cache, with the scheduler of the pipeline and the given number of steps.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations.block_adapter import transformers_of
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.recording import Step, handled
from cachedit_fx.tuning.schedule import Schedule
from cachedit_fx.tuning.search import Pace, Search
from cachedit_fx.tuning.solvers import Solver, reason_of, with_scheduler
from cachedit_fx.tuning.targets import Budget

log = logging.getLogger(__name__)

STEPS = "num_inference_steps"  # The argument of a pipeline that says how many steps a generation has.
_FIXED = ("sigmas", "timesteps")  # Arguments that determine the steps themselves.
_LEAST_STEPS = 2
_UNCACHED_SHARE = 0.6  # The share of the budget for alternatives without the cache.
_LEAST_FOR_CACHE = 3  # The number of runs that the search for a schedule needs at least.
_SLOPE = 30.0  # The gain in PSNR, in dB, for ten times as many steps: between that of first and second order.
_MARGIN_FOR_CACHE = 4.0  # By how many dB the steps alone must be better than the target, so that the cache has room.


def why_not(calls: Sequence[Call]) -> str:
    """Returns why no other number of steps can be tried with these calls; empty if it can."""
    for call in calls:
        if callable(call.given):
            return "the calls are functions, and their number of steps cannot be changed"
        if not isinstance(call.given.get(STEPS), int):
            return f"a call does not contain {STEPS}"
        if fixed := [name for name in _FIXED if call.given.get(name) is not None]:
            return f"a call contains {fixed[0]}"
    if len({steps_given(call) for call in calls}) > 1:
        return f"the calls differ in {STEPS}"
    return ""


def steps_given(call: Call) -> int:
    return int(call.given[STEPS])  # type: ignore[index]


def with_steps(call: Call, steps: int) -> Call:
    """Returns the call with another number of steps and the same noise."""
    assert not callable(call.given)
    return replace(call, given={**call.given, STEPS: steps})


@dataclass(frozen=True)
class FewerStepsPace(Pace):
    """Times relative to those of the given calls, for generations with fewer steps.

    Attributes:
        of: The pace of the given calls.
    """

    of: Pace = field(kw_only=True)

    def speedup(self, share_computed: float) -> float:
        return self.of.speedup(share_computed * self.num_steps / self.of.num_steps)


class FewerStepsMeter(Meter):
    """Runs the calls with another number of steps. The references remain those of the given calls.

    It must be used while the pipeline has the scheduler of the alternative.
    """

    def __init__(self, of: Meter, prefix: str, steps: int) -> None:
        super().__init__(of.pipe, of.modules, of.calls, of.references, of.peak)
        self._of, self._prefix, self._steps = of, prefix, steps
        known = {key: found for key, found in of.measured.items() if key.startswith(prefix)}
        self.measured = {key.removeprefix(prefix): found for key, found in known.items()}

    def measure(self, key: str, run: Callable[[Call], Tensor], share_computed: Callable[[], float]) -> Measured:
        def run_fewer(call: Call) -> Tensor:
            return run(with_steps(call, self._steps))

        self.measured[key] = found = self._of.measure(self._prefix + key, run_fewer, share_computed)
        return found


@dataclass(frozen=True, eq=False)
class Tried:
    """A measured alternative.

    Attributes:
        solver: The scheduler.
        steps: The number of steps that the pipeline was called with.
        measured: The measurement. Its share is relative to the steps of the given calls.
        schedule: The schedule of the cache; None without the cache.
    """

    solver: Solver
    steps: int
    measured: Measured
    schedule: Schedule | None = None


@dataclass
class AlternativeSearch:
    """Looks for the fewest steps that reach the target, then for a schedule of the cache for slightly more steps.

    Attributes:
        solvers: The schedulers to try, that of the pipeline first.
        meter: Runs the given calls.
        pace: The pace of the given calls.
        budget: The limit on measurements.
        shortfall: Returns by how many dB a measurement misses a target for the quality; not above 0 if it is reached.
            None if the target is a speed-up.
        search: Returns the search for a schedule with a number of steps, from the calls and their meter and budget.
        report: Called with a line before every measurement.
        found: All measured alternatives.
    """

    solvers: Sequence[Solver]
    meter: Meter
    pace: Pace
    budget: Budget
    shortfall: Callable[[Measured], float] | None
    search: Callable[[Sequence[Call], FewerStepsMeter, Budget], Search]
    report: Callable[[str], None]
    found: list[Tried] = field(default_factory=list)

    def run(self, most_calls: int) -> None:
        """Runs the search and fills `found`.

        Args:
            most_calls: The number of calls of the model per guidance branch that an alternative without the cache
                starts with.
        """
        first = [self._measure(solver, self._steps_for(solver, most_calls)) for solver in self.solvers]
        ran = [tried for tried in first if tried is not None]
        if not ran:
            return
        best = max(ran, key=lambda tried: tried.measured.psnr)
        if self.shortfall is None:
            self._add_cache(best.solver, min(self._given_steps, math.ceil(1.5 * best.steps)), most_calls)
            return
        fewest = self._fewest(best.solver, best.steps)
        if fewest is not None:
            left = max(0.0, _MARGIN_FOR_CACHE + self.shortfall(fewest.measured))
            steps = min(self._given_steps, math.ceil(fewest.steps * 10 ** (left / _SLOPE)))
            self._add_cache(best.solver, steps, most_calls)

    @property
    def _given_steps(self) -> int:
        return steps_given(self.meter.calls[0])

    def _steps_for(self, solver: Solver, calls: int) -> int:
        """Returns the largest number of steps with at most this many calls of the model per guidance branch."""
        own = self.solvers[0].order
        # Also for pipelines that run only a part of the steps that they are told, such as image to image.
        told = calls * self._given_steps / max(1, self.pace.num_steps)
        is_same_order = solver.order == own
        steps = told if is_same_order else (told * own + solver.order - 1) / solver.order
        return max(_LEAST_STEPS, min(self._given_steps, math.floor(steps + 1e-6)))

    def _fewest(self, solver: Solver, steps: int) -> Tried | None:
        """Looks for the fewest steps that reach the target, beginning with a measured number."""
        assert self.shortfall is not None
        short: dict[int, float] = {}  # By how many dB each number of steps misses the target.
        reached: Tried | None = None
        while (tried := self._measure(solver, steps)) is not None:
            short[steps] = self.shortfall(tried.measured)
            reached = tried if short[steps] <= 0 else reached
            fails = max((n for n in short if short[n] > 0), default=_LEAST_STEPS - 1)
            reaches = min((n for n in short if short[n] <= 0), default=self._given_steps + 1)
            if reaches - fails <= 1 or self.budget.share_used > _UNCACHED_SHARE:
                break
            slope = _SLOPE
            if fails in short and reaches in short:
                slope = (short[fails] - short[reaches]) / math.log10(reaches / fails)
            guess = math.ceil(steps * 10 ** (short[steps] / slope))
            steps = min(max(guess, fails + 1), reaches - 1)
        return reached

    def _measure(self, solver: Solver, steps: int) -> Tried | None:
        """Measures an alternative without the cache; returns None if it does not run or the budget is over."""
        known = [t for t in self.found if t.solver is solver and t.steps == steps and t.schedule is None]
        if known or self.budget.is_over:
            return known[0] if known else None
        if solver.is_own and steps >= self._given_steps:
            return None  # This is the reference itself.
        key = key_of(solver, steps)
        counts: list[int] = []

        def run(call: Call) -> Tensor:
            with counted(self.meter.pipe) as count:
                output = with_steps(call, steps).run(self.meter.pipe)
            counts.append(count())
            return output

        self.report(f"{solver.name}, {steps} steps")
        is_new = not self.meter.is_measured(key)
        try:
            with with_scheduler(self.meter.pipe, solver.scheduler):
                measured = self.meter.measure(key, run, lambda: statistics.fmean(counts) / self.pace.num_steps)
        except Exception as error:  # Whatever a scheduler and a pipeline that do not fit raise.
            log.info("%s is not tried, because it does not run with this pipeline: %s", solver.name, reason_of(error))
            return None
        self.budget.spend(is_new)
        if not all(map(math.isfinite, measured.errors)):
            log.info("%s is not tried, because its images contain values that are not finite", solver.name)
            return None
        self.found.append(Tried(solver, steps, measured))
        return self.found[-1]

    def _add_cache(self, solver: Solver, steps: int, count: int) -> None:
        """Searches for a schedule of the cache with this number of steps, beginning with `count` computed ones."""
        budget = self.budget.part(1.0)
        if self.budget.is_over or (budget.kind == "runs" and budget.value < _LEAST_FOR_CACHE):
            return
        self.report(f"{solver.name}, {steps} steps with the cache")
        budget.spend()  # For the recording, which is a run without the cache.
        try:
            with with_scheduler(self.meter.pipe, solver.scheduler):
                meter = FewerStepsMeter(self.meter, key_of(solver, steps) + " ", steps)
                search = self.search([with_steps(call, steps) for call in self.meter.calls], meter, budget)
                search.run_near(count)
        except ConfigError as error:
            log.info("the cache is not tried with %s and %d steps: %s", solver.name, steps, error)
            return
        best = search.best()
        if best is not None:
            schedule, measured = best
            share = measured.share_computed * schedule.num_steps / self.pace.num_steps
            self.found.append(Tried(solver, steps, replace(measured, share_computed=share), schedule))


def key_of(solver: Solver, steps: int) -> str:
    return f"{solver.name} {steps} steps"


@contextmanager
def counted(pipe: Any) -> Iterator[Callable[[], int]]:
    """Counts the calls of the transformers per guidance branch. Yields a function that returns the number."""
    numbers: dict[str, int] = {}

    def handler_for(name: str) -> Callable[[Step, Callable[[], Any]], Any]:
        def handle(step: Step, run: Callable[[], Any]) -> Any:
            numbers[name] = max(numbers.get(name, 0), step.number + 1)
            return run()

        return handle

    with ExitStack() as stack:
        for name, module in transformers_of(pipe).items():
            stack.enter_context(handled(module, handler_for(name)))
        yield lambda: sum(numbers.values())
