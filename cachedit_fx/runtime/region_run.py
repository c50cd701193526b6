"""A region during one step, and the configuration that it runs with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.passes.analysis.runtime_plan import PartialSizes, RegionPlan
from cachedit_fx.policies import Decision, History
from cachedit_fx.runtime import host_memory
from cachedit_fx.runtime.cached_values import CachedValue, Forecast
from cachedit_fx.runtime.guidance import Following
from cachedit_fx.runtime.host_read import HostRead
from cachedit_fx.runtime.snapshot import RegionState


@dataclass(frozen=True, slots=True)
class Policy:
    """The configuration of the session, and of each region.

    Attributes:
        owner: Equal for equal configurations, which share their sessions.
        has_decider: Whether a decider of the user decides for any region.
    """

    owner: int
    config: CacheConfig
    regions: tuple[CacheConfig, ...]
    has_decider: bool = False


def in_layout(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with these strides. It is copied if a graph that was compiled later requires another layout."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@dataclass(slots=True)
class RegionRun:
    """A region during one step.

    Attributes:
        fits: Whether the cached values have the shapes of this call. The size may change within a session.
        is_outdated: Whether there is a gap or a jump between the cached values and this step, so nothing is forecast.
        is_agreed: Whether the other ranks that run the region are in the same state, so that they decide alike.
        diff: The residual diff; NaN if there is none, or if nothing depends on it.
        read: The probe vector.
        is_measured: Whether `diff` and `is_outdated` have been set.
        following: How it follows another guidance branch (`guidance_reuse`); None if it does not.
    """

    plan: RegionPlan
    config: CacheConfig
    state: RegionState
    sizes: PartialSizes
    fits: bool
    forecast: Forecast | None = None
    is_outdated: bool = False
    decision: Decision | None = None
    is_agreed: bool = True
    history: History = field(default_factory=History)
    diff: float = math.nan
    read: HostRead | None = None
    is_measured: bool = False
    following: Following | None = None


def covered_live_outs(run: RegionRun) -> tuple[bool, ...]:
    """Which live-outs of the region are forecast."""
    return run.forecast.covers(run.plan.roles) if run.forecast is not None else (False,) * len(run.plan.roles)


def is_moved_to_host(run: RegionRun) -> bool:
    """Whether the cached values of the region are in host memory between two steps."""
    return run.config.cache_device is not None and host_memory.is_moved(run.plan.devices[-1])


def on_device(run: RegionRun, cached: tuple[CachedValue, ...]) -> tuple[CachedValue, ...]:
    """The cached values on the devices of the region."""
    if not is_moved_to_host(run):
        return cached
    devices = run.plan.devices[run.plan.has_probe :]
    return tuple(host_memory.on_device(value, device) for value, device in zip(cached, devices, strict=False))


def state_fits(plan: RegionPlan, config: CacheConfig, state: RegionState, sizes: PartialSizes) -> bool:
    """Whether everything is cached, in the sizes that are known so far."""
    others = () if config.cache_device is None else (host_memory.HOST,)
    tensors = (*((state.probe,) if plan.has_probe else ()), *(cached.last for cached in state.cached))
    return len(tensors) == len(plan.dtypes) and all(
        tensor is not None
        and (size is None or tensor.shape == size[0])
        and tensor.dtype == dtype
        and tensor.device in (device, *others)
        for tensor, size, dtype, device in zip(tensors, sizes, plan.dtypes, plan.devices, strict=True)
    )
