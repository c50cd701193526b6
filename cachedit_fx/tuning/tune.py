"""Runs the whole search in one call: `tune`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from cachedit_fx.errors import ConfigError, NoMatchError, shown
from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig
from cachedit_fx.tuning.alternatives import AlternativeSearch, FewerStepsMeter, FewerStepsPace, Tried, why_not
from cachedit_fx.tuning.cached import config_of, measure_cached, threshold_config
from cachedit_fx.tuning.calls import Call, calls_of
from cachedit_fx.tuning.choice import Chosen, choose_cached, result_of
from cachedit_fx.tuning.fit import Fitting, fitting
from cachedit_fx.tuning.generations import Recording, record
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.problems import problems_of
from cachedit_fx.tuning.progress import Progress, shown_progress, without_bars
from cachedit_fx.tuning.saved import Config
from cachedit_fx.tuning.search import Search
from cachedit_fx.tuning.solvers import solvers_of
from cachedit_fx.tuning.targets import Budget, Target
from cachedit_fx.tuning.tuning_result import TuneResult

log = logging.getLogger(__name__)

FORECASTERS: tuple[LinearForecaster, ...] = (
    FittedCalibratorConfig(memory=3),
    FittedCalibratorConfig(memory=4),
    FittedCalibratorConfig(memory=2),
    *(PolynomialCalibratorConfig(order=order, by=by) for order in (1, 2, 3) for by in ("timestep", "step")),
    PolynomialCalibratorConfig(order=0),
    TaylorSeerCalibratorConfig(taylorseer_order=2),
)
_SMOOTH = PolynomialCalibratorConfig(order=1)
THRESHOLDS = (0.08, 0.12, 0.2, 0.3)
MAX_BYTES = 4 << 30
_SHARE = 1 / 3  # The share of the budget for alternatives.


def tune(
    pipe: Any,
    calls: Sequence[Any],
    *,
    target: Any,
    at_least: Any = None,
    at_most: Any = None,
    budget: Any = "runs=36",
    alternatives: str = "report",
    schedulers: str = "any",
    forecasters: Sequence[LinearForecaster] = FORECASTERS,
    thresholds: Sequence[float] = THRESHOLDS,
    peak: float | None = None,
    confirm: bool = True,
    resume: str | PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TuneResult:
    """Finds which steps to compute, and how to forecast the others, from a few calls of a pipeline.

        tune(pipe, calls, target="fastest", at_least="psnr=40")
        tune(pipe, calls, target="best", at_least="speedup=2")

    The calls run once without the cache. From what the model returned, the best schedule is predicted for every number
    of computed steps, and the candidates among these schedules are measured. Then, thresholds are measured while the
    budget lasts. Every candidate is a `CacheConfig` whose other fields have their defaults. A third of the budget is
    for alternatives: fewer steps, with the scheduler of the pipeline and with others, without and with the cache.

    Args:
        pipe: A pipeline, or any callable with a `transformer`, without a cache. It is returned in the same state.
        calls: Dicts of the pipeline's arguments, or functions that take the pipeline and return its images. Each is
            one generation, and all have the same number of steps. Their generators are reset before every run.
        target: "fastest" with a limit on the quality, or "best" with a limit on the speed. Or the limit alone:
            `"psnr=35"` (dB), `"rel_l2=0.05"` or `"speedup=2"`; or a dict such as `{"psnr": 35}`.
        at_least: The limit: `"psnr=35"` for "fastest", `"speedup=2"` for "best"; or a dict.
        at_most: The limit `"rel_l2=0.05"` for "fastest"; or a dict.
        budget: `{"runs": 24}` candidates, `{"seconds": 300}`, a number of seconds, or a string such as `"runs=24"`.
        alternatives: "report" measures alternatives and reports them, "choose" also chooses one if it is better than
            the cached configuration, "off" measures none. They require calls that are dicts with
            `num_inference_steps`.
        schedulers: Which schedulers the alternatives have: "any" for all that fit, or "current".
        forecasters: The forecasters to try.
        thresholds: The thresholds of the dynamic policy to try; may be empty.
        peak: The peak value of the PSNR. The default is 1 for outputs within [0, 1], else the range of the outputs.
        confirm: Whether to measure the chosen configuration once more with the cache enabled.
        resume: A JSON file that stores the measurements, so that an interrupted search can continue.
        max_bytes: The largest size of the outputs of the model in one generation, in bytes of float32.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The chosen configuration, its measured and predicted quality, and all other candidates.

    Raises:
        ConfigError: The value of an argument is not allowed, or `tune` does not support the pipeline or the calls.
    """
    wanted, limit, runs = Target.of(target, at_least, at_most), Budget.of(budget), calls_of(calls)
    _check_forecasters(forecasters)
    _check_word("alternatives", alternatives, ("report", "choose", "off"))
    _check_word("schedulers", schedulers, ("any", "current"))
    why_none = why_not(runs) if alternatives != "off" else ""
    has_alternatives = alternatives != "off" and not why_none
    log.info("tune looks for %s; budget: %s=%g", wanted.sentence, limit.kind, limit.value)
    with shown_progress(progress, limit) as bar, without_bars(pipe):
        bar.show("runs the calls without the cache")
        recording = record(pipe, runs, max_bytes)
        meter = Meter(
            *(pipe, recording.modules, runs, recording.outputs),
            peak=_peak(recording.outputs) if peak is None else peak,
            resume=None if resume is None else Path(resume),
        )
        tuner = _Tuner(wanted, limit, tuple(forecasters), max_bytes, bar)
        search = tuner.search(recording, meter, limit.part(1 - _SHARE) if has_alternatives else limit)
        search.report = partial(_show, bar, search)
        search.run()
        points = _points(search) + _thresholds(search, thresholds)
        cached = choose_cached(search, points, confirm=confirm)
        tried = tuner.alternatives(search, cached, is_any=schedulers == "any") if has_alternatives else []
        may_choose = alternatives == "choose"
        result = result_of(search, recording, cached, points, tried, may_choose=may_choose, confirm=confirm)
    log.info("tune measured %d candidates; %s: %s", limit.used, wanted, result.verified)
    return replace(result, why_no_alternatives=why_none)


@dataclass(frozen=True)
class _Tuner:
    """What the searches of one call of `tune` have in common."""

    target: Target
    limit: Budget
    forecasters: tuple[LinearForecaster, ...]
    max_bytes: int
    bar: Progress

    def search(self, recording: Recording, meter: Meter, budget: Budget) -> Search:
        """Returns the search for a schedule for the recorded calls."""
        problems = {by: problems_of(recording.recorded, by, recording.starts) for by in ("step", "timestep")}
        tried = [fitting(forecaster, problems["step"]) for forecaster in self.forecasters]
        return Search(problems, tried, meter, self.target, budget, recording.pace, report=self.bar.show)

    def alternatives(self, search: Search, cached: Chosen, *, is_any: bool) -> list[Tried]:
        """Measures alternatives to the chosen configuration while the budget lasts."""
        pace, meter, target = search.pace, search.meter, self.target

        def shortfall(measured: Measured) -> float:
            return target.shortfall(measured.psnr - measured.margin_db, measured.rel_l2 + measured.margin_rel_l2)

        def search_fewer(calls: Sequence[Call], fewer: FewerStepsMeter, budget: Budget) -> Search:
            recording = record(meter.pipe, calls, self.max_bytes)
            own = {field.name: getattr(recording.pace, field.name) for field in fields(recording.pace)}
            return self.search(replace(recording, pace=FewerStepsPace(**own, of=pace)), fewer, budget)

        found = AlternativeSearch(
            solvers_of(getattr(meter.pipe, "scheduler", None), others=is_any),
            meter,
            pace,
            self.limit.part(1.0),
            None if target.kind == "speedup" else shortfall,
            search_fewer,
            self.bar.show,
        )
        shares = (calls / pace.num_steps for calls in range(pace.num_steps, 0, -1))
        allowed = (share for share in shares if target.kind != "speedup" or pace.speedup(share) >= target.value)
        share = next(allowed, 0.0) if target.kind == "speedup" else cached.measured.share_computed
        if not self.limit.is_over:
            found.run(round(share * pace.num_steps))
        return found.found


def _show(bar: Progress, search: Search, line: str) -> None:
    if (best := search.best()) is not None:
        bar.best = f"{best[1].psnr:.1f} dB at {search.pace.speedup(best[1].share_computed):.2f} times the speed"
    bar.show(line)


def _check_forecasters(forecasters: Sequence[LinearForecaster]) -> None:
    if not forecasters or not all(isinstance(each, LinearForecaster) for each in forecasters):
        raise ConfigError(
            "cachedit_fx: forecasters must be a list of linear forecasters, such as PolynomialCalibratorConfig("
            f"order=2), got {shown(forecasters)}"
        )


def _check_word(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"cachedit_fx: {name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def _peak(outputs: Sequence[Tensor]) -> float:
    low, high = min(float(o.min()) for o in outputs), max(float(o.max()) for o in outputs)
    return 1.0 if low >= 0 and 0.5 < high <= 1 else (high - low) or 1.0


def _points(search: Search) -> list[tuple[Config, Measured]]:
    return [(config_of(schedule, [*search.meter.modules]), measured) for schedule, measured in search.found.items()]


def _thresholds(search: Search, thresholds: Sequence[float]) -> list[tuple[Config, Measured]]:
    """Measures the dynamic policy with the forecaster of the best schedule, largest threshold first."""
    best = search.best()
    found: list[tuple[Config, Measured]] = []
    for threshold in sorted(thresholds, reverse=True):
        if best is None or search.budget.is_over:
            break
        fits = isinstance(best[0].forecaster, Fitting)  # It needs computed steps that are known beforehand.
        config = threshold_config(threshold, _SMOOTH if fits else best[0].forecaster)
        search.budget.spend()
        try:
            measured = measure_cached(search.meter, config, f"threshold {threshold:g} {config.forecaster!r}")
        except (ConfigError, NoMatchError) as error:
            log.info("no more thresholds are measured: %s", error)
            break
        search.report(f"threshold {threshold:g}: PSNR {measured.psnr:.1f} dB")
        found.append((config, measured))
    return found
