"""A session: the cache state of one guidance branch of one generation, across its steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from cachedit_fx.runtime.cached_values import NotForecast
from cachedit_fx.runtime.guidance_branch import SessionKey
from cachedit_fx.runtime.host_read import known
from cachedit_fx.runtime.snapshot import Snapshot
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.stopwatch import StepTimes


class Session:
    """The cache state of one guidance branch of one generation. A step replaces `snapshot`.

    Attributes:
        first: The number of its first step among the steps of all sessions; 0 before.
        last: The number of its last step among the steps of all sessions; 0 before.
        num_bytes: The size of its cached values.
        bound: The effect of the bounds on the memory of all sessions (`CacheStats.bound`).
    """

    __slots__ = ("bound", "epoch", "first", "key", "last", "num_bytes", "request", "snapshot")

    def __init__(self, key: SessionKey, request: Hashable | None, epoch: int) -> None:
        self.epoch = epoch
        self.key = key
        self.request = request
        self.first = self.last = 0
        self.num_bytes, self.bound = 0, ""
        self.snapshot = Snapshot()

    @property
    def is_named(self) -> bool:
        """Whether a `session(key)` names its request."""
        return self.request is not None

    @property
    def name(self) -> str:
        key = self.key.guidance_branch
        guidance_branch = key.label or ("" if key.token is None else f"conditioning {key.token}")
        named = "" if self.request is None else str(self.request)
        further = f"call {self.key.ordinal + 1} of a step" if self.key.ordinal else ""
        return ", ".join(filter(None, (named, guidance_branch, further))) or "unnamed"

    def stats(self, *, finished: bool, num_dropped: int = 0) -> list[CacheStats]:
        return [
            CacheStats(
                region=name,
                session=self.name,
                num_steps=len(state.decisions),
                cached_steps=[i for i, decision in enumerate(state.decisions) if not decision.compute],
                residual_diffs={i: d for i, d in enumerate(state.diffs) if state.decisions[i].probed},
                decisions=[decision.reason for decision in state.decisions],
                state_bytes=0 if finished else state.num_bytes,
                peak_state_bytes=state.num_bytes,
                began=self.snapshot.began,
                timesteps=[*map(known, self.snapshot.timesteps)],
                thresholds={i: d.threshold for i, d in enumerate(state.decisions) if d.threshold is not None},
                step_seconds=StepTimes(self.snapshot.step_times),
                errors={i: error for i, error in enumerate(state.errors) if error is not None},
                accumulated={i: d.accumulated for i, d in enumerate(state.decisions) if d.accumulated is not None},
                not_forecast=NotForecast(state.verdicts),
                bound=self.bound,
                num_dropped=num_dropped,
            )
            for name, state in self.snapshot.regions.items()
        ]


@dataclass(frozen=True, slots=True)
class Record:
    """The statistics of a session, running or finished, and the numbers of its first and last step."""

    key: SessionKey
    first: int
    last: int
    stats: list[CacheStats]
