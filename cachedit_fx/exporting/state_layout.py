"""The state of an exported model: which tensors it consists of, in which order, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.exporting.tensor_spec import TensorSpec
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.verdict import RECENT, num_verdicts
from cachedit_fx.passes.analysis.cached_examples import cached_examples
from cachedit_fx.passes.analysis.runtime_plan import RegionPlan, RuntimePlan
from cachedit_fx.passes.plan import Plan
from cachedit_fx.runtime.cached_values import covered

NUM_TIMESTEPS = RECENT + 1  # The previous timesteps that `verdict.is_gap` reads.
NUM_DIFFS = RECENT  # The previous residual diffs that `verdict.is_jump` reads.


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """The state of one region.

    Attributes:
        prefix: What the names of its tensors begin with; empty if the model has one region.
        plan: The sizes and roles of what is cached.
        config: The configuration of the region.
        values: For each live-out, the tensor that is cached of it.
        covered: For each live-out, whether it is forecast.
    """

    prefix: str
    plan: RegionPlan
    config: CacheConfig
    probe: TensorSpec | None
    values: tuple[TensorSpec, ...]
    covered: tuple[bool, ...]

    @property
    def forecaster(self) -> Forecaster | None:
        return self.config.forecaster if any(self.covered) else None

    @property
    def depth(self) -> int:
        """The number of computed steps that are remembered."""
        return self.forecaster.depth if self.forecaster is not None else 1

    def names_of(self, live_out: int) -> list[str]:
        """The names of the cached values of a live-out, newest first."""
        depth = self.depth if self.covered[live_out] else 1
        return [f"{self.values[live_out].name}.{age}" for age in range(depth)]

    def verdict_of(self, live_out: int) -> str:
        """The name of the verdict on the forecasts of a live-out."""
        return self.values[live_out].name.replace("cached.", "verdict.")

    def specs(self) -> Iterator[TensorSpec]:
        """All tensors of the region, in order."""
        device = self.plan.devices[-1]

        def numbers(name: str, dtype: torch.dtype, *shape: int) -> TensorSpec:
            return TensorSpec(self.prefix + name, shape, dtype, device)

        yield numbers("num_reused", torch.int64)
        yield numbers("num_continuous", torch.int64)
        yield numbers("accumulated_diff", torch.float64)
        yield numbers("num_values", torch.int64)
        if self.forecaster is not None:
            yield numbers("positions", torch.float64, self.depth)
            yield numbers("is_outdated", torch.bool)
            yield numbers("diffs", torch.float64, NUM_DIFFS)
        if self.probe is not None:
            yield self.probe
        for i, value in enumerate(self.values):
            for name in self.names_of(i):
                yield TensorSpec(name, value.shape, value.dtype, value.device)
            if self.covered[i]:
                yield numbers(self.verdict_of(i).removeprefix(self.prefix), torch.bool, _num_samples(value))


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The state of a model: the number of the step, the last timesteps if a forecaster needs them, and the regions."""

    regions: tuple[RegionLayout, ...]
    has_timestep: bool
    device: torch.device

    @property
    def remembers_timesteps(self) -> bool:
        return self.has_timestep and any(region.forecaster is not None for region in self.regions)

    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors of the state, in order. All of them are zero before the first step."""
        found = [TensorSpec("num_steps", (), torch.int64, self.device)]
        if self.remembers_timesteps:
            found.append(TensorSpec("timesteps", (NUM_TIMESTEPS,), torch.float64, self.device))
        return (*found, *(spec for region in self.regions for spec in region.specs()))


def layout_of(plan: Plan, runtime_plan: RuntimePlan, config: CacheConfig) -> StateLayout:
    """The state of a model whose graph has been rewritten."""
    regions = []
    for number, (region, region_plan) in enumerate(zip(plan.regions, runtime_plan.regions, strict=True)):
        overridden = config.override(region_plan.overrides)
        prefix = f"region_{number}." if len(plan.regions) > 1 else ""
        examples = cached_examples(region)
        probe = TensorSpec.of(f"{prefix}probe", examples.pop(0)) if region_plan.has_probe else None
        values = tuple(
            TensorSpec.of(f"{prefix}cached.{role}", example)
            for role, example in zip(region_plan.roles, examples, strict=True)
        )
        is_covered = _covered(overridden, region_plan, values)
        regions.append(RegionLayout(prefix, region_plan, overridden, probe, values, is_covered))
    return StateLayout(tuple(regions), runtime_plan.has_timestep, runtime_plan.regions[0].devices[-1])


def _covered(config: CacheConfig, plan: RegionPlan, values: tuple[TensorSpec, ...]) -> tuple[bool, ...]:
    if config.forecaster is None:
        return (False,) * len(values)
    wanted = covered(config.forecaster, plan.roles)
    return tuple(w and value.dtype.is_floating_point for w, value in zip(wanted, values, strict=True))


def _num_samples(value: TensorSpec) -> int:
    return num_verdicts(torch.empty(value.shape, device="meta"))
