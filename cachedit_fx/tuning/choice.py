"""Chooses among all that was measured, and puts the result together: `choose_cached`, `result_of`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.integrations.signature import Signature, config_of_part, signature_of
from cachedit_fx.tuning.alternatives import FewerStepsMeter, Tried, key_of, with_steps
from cachedit_fx.tuning.cached import config_of, measure_cached
from cachedit_fx.tuning.generations import Recording
from cachedit_fx.tuning.measure import Measured
from cachedit_fx.tuning.points import Alternative, Point, Quality, best_of, is_better, verdict
from cachedit_fx.tuning.saved import Config
from cachedit_fx.tuning.schedule import Schedule
from cachedit_fx.tuning.search import Pace, Search
from cachedit_fx.tuning.solvers import with_scheduler
from cachedit_fx.tuning.tuning_result import TuneResult

log = logging.getLogger(__name__)

Points = Sequence[tuple[Config, Measured]]


@dataclass(frozen=True)
class Chosen:
    """A configuration and its measurement.

    Attributes:
        config: The configuration.
        measured: The measurement; its share is relative to the steps of the given calls.
        is_confirmed: Whether it was measured as it will run, and not by simulating a schedule.
        tried: The alternative; None for a configuration with the given scheduler and number of steps.
    """

    config: Config
    measured: Measured
    is_confirmed: bool
    tried: Tried | None = None


def choose_cached(search: Search, points: Points, *, confirm: bool) -> Chosen:
    """Returns the fastest configuration that reaches the target.

    For a target speed-up, or if none reaches the target, it is the one with the highest PSNR.
    """
    reaching = [pair for pair in points if search.is_reached(pair[1])]
    if reaching and search.target.kind != "speedup":
        config, measured = min(reaching, key=lambda pair: (pair[1].share_computed, -pair[1].psnr))
    else:
        config, measured = max(reaching or points, key=lambda pair: pair[1].psnr)
    if not confirm:
        return Chosen(config, measured, False)
    again = measure_cached(search.meter, config, f"cached {config!r}")
    # This run was not compiled, so its time says less about the speed than the share from the search.
    return Chosen(config, replace(again, share_computed=measured.share_computed), True)


def result_of(
    search: Search,
    recording: Recording,
    cached: Chosen,
    points: Points,
    tried: Sequence[Tried],
    *,
    may_choose: bool,
    confirm: bool,
) -> TuneResult:
    """Returns the result of `tune`.

    Args:
        search: The search with the given scheduler and number of steps.
        recording: What the given calls did without the cache.
        cached: The chosen configuration of the cache.
        points: All measured configurations.
        tried: The measured alternatives.
        may_choose: Whether a better alternative is chosen in place of `cached`.
        confirm: Whether to measure a chosen alternative with the cache enabled.
    """
    target, pace = search.target, search.pace
    alternatives = tuple(_alternative(search, each) for each in tried)
    quality, reached = _quality(cached.measured, pace), search.is_reached(cached.measured)
    best = best_of(target, alternatives)
    better = best if best is not None and is_better(target, best, quality, reached) else None
    chosen = cached
    if better is not None and may_choose:
        chosen = confirmed(search, tried[alternatives.index(better)], confirm=confirm)
    is_reached = search.is_reached(chosen.measured)
    if not is_reached:
        log.warning(
            "cachedit_fx: target %s was not reached: the best measured configuration has %s.\n"
            "What to do: pass a larger budget, more calls (the margin was %.1f dB), or another target.",
            *(target, _quality(chosen.measured, pace), chosen.measured.margin_db),
        )
    return TuneResult(
        chosen.config,
        target,
        is_reached,
        predicted=_expected(chosen.measured, pace),
        verified=_quality(chosen.measured, pace),
        is_confirmed=chosen.is_confirmed,
        frontier=_frontier(search, points),
        signature=_signature(search, recording, chosen),
        alternatives=alternatives,
        better=better,
        choice=better if may_choose else None,
        verdict=verdict(target, quality, reached, alternatives),
    )


def confirmed(search: Search, tried: Tried, *, confirm: bool) -> Chosen:
    """Returns an alternative as the choice. Without the cache, its configuration computes every step."""
    if tried.schedule is None:
        every = CacheConfig(max_warmup_steps=_calls_of(tried, search.pace))
        names = [*search.meter.modules]
        return Chosen(every if len(names) == 1 else dict.fromkeys(names, every), tried.measured, True, tried)
    config, measured = _config_of(search, tried.schedule), tried.measured
    if confirm:
        with with_scheduler(search.meter.pipe, tried.solver.scheduler):
            meter = FewerStepsMeter(search.meter, key_of(tried.solver, tried.steps) + " ", tried.steps)
            again = measure_cached(meter, config, f"cached {config!r}")
        measured = replace(again, share_computed=measured.share_computed)
    return Chosen(config, measured, confirm, tried)


def _calls_of(tried: Tried, pace: Pace) -> int:
    """Returns the number of calls of the model per guidance branch, computed or reused."""
    return tried.schedule.num_steps if tried.schedule else round(tried.measured.share_computed * pace.num_steps)


def _config_of(search: Search, schedule: Schedule) -> Config:
    return config_of(schedule, [*search.meter.modules])


def _alternative(search: Search, tried: Tried) -> Alternative:
    return Alternative(
        tried.solver.name,
        config_of_part(tried.solver.scheduler),
        tried.steps,
        None if tried.schedule is None else _config_of(search, tried.schedule),
        _quality(tried.measured, search.pace),
        search.is_reached(tried.measured),
    )


def _signature(search: Search, recording: Recording, chosen: Chosen) -> Signature:
    meter, tried = search.meter, chosen.tried
    calls = meter.calls if tried is None else [with_steps(call, tried.steps) for call in meter.calls]
    given = [call.given for call in calls if isinstance(call.given, Mapping)]
    num_steps = search.pace.num_steps if tried is None else _calls_of(tried, search.pace)
    with with_scheduler(meter.pipe, tried.solver.scheduler if tried else getattr(meter.pipe, "scheduler", None)):
        found = signature_of(meter.pipe, recording.modules, given, recording.inputs, num_steps)
    return found | {"guidance_branches": recording.num_guidance_branches}


def _quality(measured: Measured, pace: Pace) -> Quality:
    share = measured.share_computed
    return Quality(measured.psnr, measured.rel_l2, pace.speedup(share), share)


def _expected(measured: Measured, pace: Pace) -> Quality:
    share = measured.share_computed
    psnr, rel_l2 = measured.psnr - measured.margin_db, measured.rel_l2 + measured.margin_rel_l2
    return Quality(psnr, rel_l2, pace.speedup(share), share)


def _frontier(search: Search, points: Points) -> tuple[Point, ...]:
    """Returns the best measured point for every share, and predictions for numbers of steps without a measurement."""
    best: dict[float, Point] = {}
    for config, measured in sorted(points, key=lambda pair: pair[1].psnr):
        best[measured.share_computed] = Point(
            config, _quality(measured, search.pace), True, search.is_reached(measured)
        )
    found = [*best.values()]
    for schedule, psnr in search.expected():
        share = schedule.share_computed
        quality = Quality(psnr, math.nan, search.pace.speedup(share), share)
        found.append(Point(_config_of(search, schedule), quality, False))
    return tuple(sorted(found, key=lambda point: -point.quality.speedup))
