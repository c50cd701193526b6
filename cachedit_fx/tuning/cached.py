"""Runs the given calls with the cache enabled, to confirm a schedule or to measure a threshold."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.integrations.adapter_registry import modules_of
from cachedit_fx.integrations.pipelines import disable_cache, enable_cache
from cachedit_fx.runtime.instances import records_of
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.fit import parts_of
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.saved import Config
from cachedit_fx.tuning.schedule import NUM_FIRST, Schedule


def config_of(schedule: Schedule, names: Sequence[str]) -> Config:
    """Returns the configuration for a schedule: one for a single transformer, otherwise a dict of one for each.

    Args:
        schedule: The schedule.
        names: The names of the transformers, in the order in which they run.
    """
    configs = dict(zip(names, map(_config_of, parts_of(schedule)), strict=True))
    return configs if len(configs) > 1 else configs[names[0]]


def _config_of(schedule: Schedule) -> CacheConfig:
    """Returns the configuration of one transformer. At its reused steps, almost nothing of it runs."""
    return CacheConfig(
        Fn_compute_blocks=0,
        max_warmup_steps=0,
        num_inference_steps=schedule.num_steps,
        steps_computation_mask=schedule.mask,
        steps_computation_policy="static",
        forecaster=schedule.forecaster,
        reach="output",
        probe="none",
        **_guidance_fields(schedule),
    )


def _guidance_fields(schedule: Schedule) -> dict[str, Any]:
    if not schedule.guided:
        return {}
    mask = tuple(int(step not in schedule.guided) for step in range(schedule.num_steps))
    return {"guidance_reuse": "difference", "guidance_computation_mask": mask}


def threshold_config(threshold: float, forecaster: LinearForecaster) -> CacheConfig:
    """Returns a dynamic configuration whose probe is the residual of the first block at every step."""
    return CacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=NUM_FIRST,
        residual_diff_threshold=threshold,
        forecaster=forecaster,
    )


def measure_cached(meter: Meter, config: Config, key: str) -> Measured:
    """Measures the calls with the cache enabled and an eager inner backend, since so few steps do not repay compiling.

    The measured share is the share of the time of the model. It includes the blocks that a reused step runs.
    """
    if meter.is_measured(key):
        return meter.measured[key]
    shares: list[float] = []

    def run(call: Call) -> Tensor:
        output = call.run(meter.pipe)
        shares.append(_share(_last_generation(meter.pipe)))
        return output

    with _enabled(meter.pipe, config):
        return meter.measure(key, run, lambda: statistics.fmean(shares))


def _last_generation(pipe: Any) -> list[CacheStats]:
    records = [record for module in modules_of(pipe).values() for record in records_of(module, every_generation=False)]
    return [entry for record in records for entry in record.stats]


@contextmanager
def _enabled(pipe: Any, config: Config) -> Iterator[None]:
    enable_cache(pipe, config, inner_backend="eager", on_no_match="raise")
    try:
        yield
    finally:
        disable_cache(pipe)


def _share(ran: Sequence[CacheStats]) -> float:
    """Returns the remaining share of the time of the model, from 0 to 1.

    A reused step counts as its median time divided by that of a computed step.
    """
    reused = [entry.step_seconds[step] for entry in ran for step in entry.cached_steps]
    count = sum(entry.num_steps for entry in ran)
    computed = [s for e in ran for step, s in enumerate(e.step_seconds) if step not in {*e.cached_steps}]
    if not reused or not computed:
        return 1.0 if count else 0.0
    ratio = min(1.0, statistics.median(reused) / max(statistics.median(computed), 1e-9))
    return (len(computed) + ratio * len(reused)) / count
