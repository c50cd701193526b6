"""The state of a session between two steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from cachedit_fx.policies import Decision, History
from cachedit_fx.runtime.cached_values import CachedValue, Reused, Unread
from cachedit_fx.runtime.host_read import Timestep, known
from cachedit_fx.runtime.stats import StepError
from cachedit_fx.runtime.stopwatch import StepTime


class Difference(NamedTuple):
    """What guidance reuse stores of a region (`runtime.guidance`). Empty without `guidance_reuse`.

    Attributes:
        own: The residuals of this guidance branch at its last computed or guided step, one per live-out.
        values: The residuals of this guidance branch less those of the first one, at the steps that both computed. One
            cached value per live-out; empty before the first such step.
        session: The number that identifies the session of the first guidance branch (`Session.first`).
    """

    own: tuple[torch.Tensor | None, ...] = ()
    values: tuple[CachedValue, ...] = ()
    session: int = 0

    @property
    def lasts(self) -> tuple[torch.Tensor | None, ...]:
        """The newest of the differences."""
        return tuple(value.last for value in self.values)


class RegionState(NamedTuple):
    """The cached values of one region, and the record of its decisions.

    Attributes:
        probe: The probe at the last computed step or, with the decision rule "budget", at the last step. None before
            the first step, or without a probe.
        cached: One cached value per live-out; none before the first computed step.
        reused: The positions of the steps reused since the last computed step, and between that step and the computed
            one before it. Only recorded for a forecaster.
        is_outdated: Whether there was a gap or a jump since the last computed step.
        verdicts: The verdicts of the reused steps that may not have used the forecaster.
        difference: What guidance reuse stores.
    """

    probe: torch.Tensor | None = None
    cached: tuple[CachedValue, ...] = ()
    reused: Reused = ((), ())
    history: History = History()
    decisions: tuple[Decision, ...] = ()
    diffs: tuple[float, ...] = ()
    errors: tuple[StepError | None, ...] = ()
    is_outdated: bool = False
    verdicts: tuple[Unread, ...] = ()
    difference: Difference = Difference()

    @property
    def num_bytes(self) -> int:
        """The size of the tensors in bytes."""
        values = (*self.cached, *self.difference.values)
        counted = {id(tensor) for value in values for tensor in value.tensors}
        others = [t for t in (self.probe, *self.difference.own) if t is not None and id(t) not in counted]
        return sum(value.num_bytes for value in values) + sum(tensor.nbytes for tensor in others)


class Snapshot(NamedTuple):
    """The state of a session between two steps. It is replaced as a whole, so a step that raises changes nothing.

    Attributes:
        given_timestep: The timestep of the last step, which may not have been read; None before the first, or if the
            graph has no timestep.
        direction: The sign of the last change of the timestep; 0 while it has not changed; None if it has, and was not
            read (see `direction_of`).
        num_steps: The number of steps.
        graph: The number of the cached graph that made the last computed step.
        weights_version: `Instance.weights_version` at the last computed step.
        checksum: The checksums of the conditioning; empty if the graph computes none.
        began: Why the generation began (see `CacheStats.began`).
        timesteps: The timesteps of all steps, some of which may not have been read.
        step_indices: How many steps the scheduler had made before each step; 0.0 outside of a pipeline.
        step_times: The piece times of all steps.
        regions: The states of the regions, by name.
    """

    given_timestep: Timestep = None
    direction: int | None = 0
    num_steps: int = 0
    graph: int = -1
    weights_version: int = 0
    checksum: tuple[float, ...] = ()
    began: str = "new"
    timesteps: tuple[Timestep, ...] = ()
    step_indices: tuple[float, ...] = ()
    step_times: tuple[StepTime, ...] = ()
    regions: Mapping[str, RegionState] = MappingProxyType({})

    @property
    def timestep(self) -> float | None:
        """The timestep of the last step. May wait for the device."""
        return known(self.given_timestep)


def direction_of(snapshot: Snapshot) -> int:
    """The sign of the last change of the timestep; 1 if a scheduler counts steps of equal timesteps. May wait for the
    device.
    """
    if snapshot.direction is not None:
        return snapshot.direction
    timesteps = [number for number in map(known, snapshot.timesteps) if number is not None]
    signs = [(now > last) - (now < last) for last, now in itertools.pairwise(timesteps)]
    return next(filter(None, reversed(signs)), 1)
