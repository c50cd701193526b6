"""Runs the whole search in one call: `tune`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError, NoMatchError, shown
from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig
from cachedit_fx.integrations.signature import signature_of
from cachedit_fx.tuning.cached import config_of, measure_cached, threshold_config
from cachedit_fx.tuning.calls import calls_of
from cachedit_fx.tuning.fit import Fitting, fitting
from cachedit_fx.tuning.generations import record
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.problems import problems_of
from cachedit_fx.tuning.progress import Report, shown_progress
from cachedit_fx.tuning.search import Pace, Search
from cachedit_fx.tuning.targets import Budget, Target
from cachedit_fx.tuning.tuning_result import Point, Quality, TuneResult

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


def tune(
    pipe: Any,
    calls: Sequence[Any],
    *,
    target: Any,
    budget: Any = "runs=24",
    forecasters: Sequence[LinearForecaster] = FORECASTERS,
    thresholds: Sequence[float] = THRESHOLDS,
    peak: float | None = None,
    confirm: bool = True,
    resume: str | PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TuneResult:
    """Finds which steps to compute, and how to forecast the others, from a few calls of a pipeline.

    The calls run once without the cache. From what the model returned, the best schedule is predicted for every number
    of computed steps, and the candidates among these schedules are measured. Then, thresholds are measured while the
    budget lasts. Every candidate is a `CacheConfig` whose other fields have their defaults.

    Args:
        pipe: A pipeline, or any callable with a `transformer`, without a cache. It is returned in the same state.
        calls: Dicts of the pipeline's arguments, or functions that take the pipeline and return its images. Each is
            one generation, and all have the same number of steps. Their generators are reset before every run.
        target: `{"psnr": 35}` (dB), `{"rel_l2": 0.05}` or `{"speedup": 2}`; or a string such as `"psnr=35"`.
        budget: `{"runs": 24}` candidates, `{"seconds": 300}`, a number of seconds, or a string such as `"runs=24"`.
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
    wanted, limit, runs = Target.of(target), Budget.of(budget), calls_of(calls)
    _check_forecasters(forecasters)
    recording = record(pipe, runs, max_bytes)
    meter = Meter(
        *(pipe, recording.module, runs, recording.outputs),
        peak=_peak(recording.outputs) if peak is None else peak,
        resume=None if resume is None else Path(resume),
    )
    problems = {by: problems_of(recording.recorded, by) for by in ("step", "timestep")}
    with shown_progress(progress) as report:
        tried = [fitting(forecaster, problems["step"]) for forecaster in forecasters]
        parts = (problems, tried, meter, wanted, limit, recording.pace)
        search = Search(*parts, report=lambda line: report(line, limit.share_used))
        search.run()
        points = _points(search) + _thresholds(search, thresholds, report)
        config, measured, is_confirmed = _choice(search, points, confirm)
    is_reached = search.is_reached(measured)
    if not is_reached:
        log.warning(
            "cachedit_fx: target %s was not reached: the best measured configuration has %s.\n"
            "What to do: pass a larger budget, more calls (the margin was %.1f dB), or another target.",
            *(wanted, _quality(measured, recording.pace), measured.margin_db),
        )
    given = [call.given for call in runs if isinstance(call.given, Mapping)]
    return TuneResult(
        config,
        wanted,
        is_reached,
        predicted=_expected(measured, recording.pace),
        verified=_quality(measured, recording.pace),
        is_confirmed=is_confirmed,
        frontier=_frontier(search, points),
        signature=signature_of(pipe, recording.module, given, recording.inputs, recording.pace.num_steps),
    )


def _check_forecasters(forecasters: Sequence[LinearForecaster]) -> None:
    if not forecasters or not all(isinstance(each, LinearForecaster) for each in forecasters):
        raise ConfigError(
            "cachedit_fx: forecasters must be a list of linear forecasters, such as PolynomialCalibratorConfig("
            f"order=2), got {shown(forecasters)}"
        )


def _peak(outputs: Sequence[Tensor]) -> float:
    low, high = min(float(o.min()) for o in outputs), max(float(o.max()) for o in outputs)
    return 1.0 if low >= 0 and 0.5 < high <= 1 else (high - low) or 1.0


def _points(search: Search) -> list[tuple[CacheConfig, Measured]]:
    return [(config_of(schedule), measured) for schedule, measured in search.found.items()]


def _thresholds(search: Search, thresholds: Sequence[float], report: Report) -> list[tuple[CacheConfig, Measured]]:
    """Measures the dynamic policy with the forecaster of the best schedule, largest threshold first."""
    best, found = search.best(), []
    for threshold in sorted(thresholds, reverse=True):
        if best is None or search.budget.is_over:
            break
        fits = isinstance(best[0].forecaster, Fitting)  # It needs computed steps that are known beforehand.
        config = threshold_config(threshold, _SMOOTH if fits else best[0].forecaster)
        search.budget.used += 1
        try:
            measured = measure_cached(search.meter, config, f"threshold {threshold:g} {config.forecaster!r}")
        except (ConfigError, NoMatchError) as error:
            log.info("no more thresholds are measured: %s", error)
            break
        report(f"threshold {threshold:g}: PSNR {measured.psnr:.1f} dB", search.budget.share_used)
        found.append((config, measured))
    return found


def _choice(
    search: Search, points: Sequence[tuple[CacheConfig, Measured]], confirm: bool
) -> tuple[CacheConfig, Measured, bool]:
    """Returns the chosen configuration, its measurement, and whether it was measured with the cache enabled.

    This is the fastest configuration that reaches the target. For a target speed-up, or if none reaches the target, it
    is the one with the highest PSNR.
    """
    reaching = [pair for pair in points if search.is_reached(pair[1])]
    if reaching and search.target.kind != "speedup":
        config, measured = min(reaching, key=lambda pair: (pair[1].share_computed, -pair[1].psnr))
    else:
        config, measured = max(reaching or points, key=lambda pair: pair[1].psnr)
    if not confirm:
        return config, measured, False
    again = measure_cached(search.meter, config, f"cached {config.changes!r}")
    # This run was not compiled, so its time says less about the speed than the share from the search.
    return config, replace(again, share_computed=measured.share_computed), True


def _quality(measured: Measured, pace: Pace) -> Quality:
    share = measured.share_computed
    return Quality(measured.psnr, measured.rel_l2, pace.speedup(share), share)


def _expected(measured: Measured, pace: Pace) -> Quality:
    margin, share = measured.margin_db, measured.share_computed
    return Quality(measured.psnr - margin, measured.rel_l2 * 10 ** (margin / 20), pace.speedup(share), share)


def _frontier(search: Search, points: Sequence[tuple[CacheConfig, Measured]]) -> tuple[Point, ...]:
    """Returns the best measured point for every share, and predictions for numbers of steps without a measurement."""
    best: dict[float, Point] = {}
    for config, measured in sorted(points, key=lambda pair: pair[1].psnr):
        best[measured.share_computed] = Point(config, _quality(measured, search.pace), True)
    found = [*best.values()]
    for schedule, psnr in search.expected():
        share = schedule.share_computed
        quality = Quality(psnr, math.nan, search.pace.speedup(share), share)
        found.append(Point(config_of(schedule), quality, False))
    return tuple(sorted(found, key=lambda point: -point.quality.speedup))
