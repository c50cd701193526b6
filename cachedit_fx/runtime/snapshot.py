"""What a session is between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from cachedit_fx.policies import Decision, History
from cachedit_fx.runtime.cached_values import CachedValue, Reused, Unread
from cachedit_fx.runtime.stats import StepError
from cachedit_fx.runtime.stopwatch import PieceTime


class RegionState(NamedTuple):
    """What one region keeps from its last computed steps, and the record of its decisions.

    Attributes:
        probe: The probe at the last computed step or, where a budget decides, at the last step; None
            before the first, or where it looks at nothing.
        cached: One per value that leaves the region; none before the first computed step.
        reused: Positions of the steps reused since the last computed one, and of those between it and the computed one
            before it; for a forecaster alone.
        is_outdated: Whether a gap or a jump has come since the last computed step.
        verdicts: Of the reused steps that may not have used the forecaster.
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

    @property
    def num_bytes(self) -> int:
        return sum(cached_value.num_bytes for cached_value in self.cached) + (
            self.probe.nbytes if self.probe is not None else 0
        )


class Snapshot(NamedTuple):
    """A session between two steps. Replaced as a whole, so that a step that raises leaves nothing behind.

    Attributes:
        timestep: Of the last step; None before the first, or where the graph has no such input.
        direction: Sign in which the timestep moves; 0 while it has not.
        num_steps: Steps so far.
        began: Why the generation began (see `CacheStats.began`).
        timesteps, piece_times: Of every step.
        graph: Number of the cached graph that made the last computed step.
        weights: What the instance's weights were at the last computed step (see `Instance.weights`).
        checksum: Of the conditioning's values; empty where the graph takes none.
    """

    timestep: float | None = None
    direction: int = 0
    num_steps: int = 0
    graph: int = -1
    weights: int = 0
    checksum: tuple[float, ...] = ()
    began: str = "new"
    timesteps: tuple[float | None, ...] = ()
    piece_times: tuple[PieceTime, ...] = ()
    regions: Mapping[str, RegionState] = MappingProxyType({})
