"""The session and the generation that a step belongs to, as its calls, its timestep and its scheduler show."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from cachedit_fx.config.cache_config import DEFAULT_WARMUP_STEPS, CacheConfig
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.verdict import is_gap
from cachedit_fx.passes.analysis.runtime_plan import RegionPlan
from cachedit_fx.policies import History, Progress
from cachedit_fx.runtime.cached_values import Forecast
from cachedit_fx.runtime.guidance_branch import LoopPosition
from cachedit_fx.runtime.host_read import Timestep, Unread, known
from cachedit_fx.runtime.instance import Instance
from cachedit_fx.runtime.region_run import Policy, RegionRun
from cachedit_fx.runtime.scheduler_run import SchedulerRun
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.snapshot import Snapshot, direction_of


class ServedGraph(Protocol):
    """What a step asks of the cached graph that it is a step of (see `CachedCall`)."""

    regions: tuple[RegionPlan, ...]
    region_key: int
    has_timestep: bool
    num_checksums: int
    copy_state: bool

    def forecast(self, forecaster: Forecaster | None) -> Forecast | None: ...
    def weighted_sum(self, tensors: tuple[torch.Tensor, ...], factors: tuple[float, ...]) -> torch.Tensor: ...


class StepInSession:
    """A step, as far as it belongs to a session. `StepRun` adds the regions."""

    __slots__ = (
        *("_call", "_instance", "_is_new", "_is_placed", "_is_timestep_set", "_loop_position", "_policy"),
        *("_scheduler_run", "_session", "_snapshot", "_was_predicted"),
    )

    def __init__(
        self,
        call: ServedGraph,
        policy: Policy,
        instance: Instance,
        opened: tuple[Session, LoopPosition],
        scheduler_run: SchedulerRun | None,
    ) -> None:
        self._call, self._policy, self._instance = call, policy, instance
        self._scheduler_run = scheduler_run
        self._session, self._loop_position = opened
        self._is_timestep_set, self._was_predicted = False, True
        self._is_placed = self._find_place()
        self._use_session(self._session)

    def _use_session(self, session: Session) -> None:
        """Makes this a step of `session`."""
        self._session, self._snapshot, self._is_new = session, session.snapshot, False
        length = self._policy.config.num_inference_steps
        if not self._loop_position.continues_in(self._scheduler_run):
            self._begin_generation("new-schedule" if session.first else "new")
        elif length is not None and self._scheduler_run is None and session.snapshot.num_steps >= length:
            self._begin_generation("length-reached")

    @property
    def _place(self) -> tuple[object, ...]:
        """Where this step is in its session and its loop, as far as `set_timestep` depends on it."""
        session, snapshot, position, run = self._session, self._snapshot, self._loop_position, self._scheduler_run
        in_loop = (position.timestep, position.calls, position.is_next_step(run), position.continues_in(run))
        return (session.key.ordinal, session.is_named, snapshot.timestep, snapshot.direction, *in_loop)

    def _find_place(self) -> bool:
        """Whether the scheduler of the pipeline tells which session and generation this step is of.

        It does in the first call of its run, and in the first call after each of its steps. The timestep is then not
        needed, unless the conditioning has to be compared, or a decider is shown the timestep.
        """
        if self._scheduler_run is None or self._call.num_checksums or self._is_shared or self._policy.has_decider:
            return False
        position = self._loop_position
        return position.is_next_step(self._scheduler_run) or not position.continues_in(self._scheduler_run)

    @property
    def _is_shared(self) -> bool:
        """Whether other ranks decide together with this one, so that all have to read."""
        return bool(self._call.regions[0].groups)

    def set_timestep(self, timestep: Timestep, checksum: tuple[float, ...] = ()) -> None:
        """Sets the timestep of the step, which determines its ordinal and may begin a new generation.

        A new generation begins if the timestep turns back, or if the conditioning has other values in the same tensor.
        In one run of a pipeline, the step index of the scheduler counts instead: the timestep may turn or stay. It is
        then not read.
        """
        self._is_timestep_set = True
        is_placed = self._is_placed
        if not is_placed:
            timestep = known(timestep)
        ordinal = self._loop_position.ordinal_at(timestep, self._scheduler_run)
        if ordinal != self._session.key.ordinal:
            self._was_predicted = False
            self._use_session(self._instance.at(self._session, ordinal))
        if self._snapshot.checksum not in ((), checksum):
            self._begin_generation("conditioning-changed")
        has_stepped = self._loop_position.is_next_step(self._scheduler_run) and not self._is_new
        direction: int | None
        if timestep is None:
            # Without a timestep, the steps of a named request, or of one run of a scheduler, are one generation.
            direction = int(self._session.is_named or has_stepped)
        elif is_placed:
            direction = None if has_stepped else 0
        else:
            assert not isinstance(timestep, Unread)
            direction = self._direction_at(timestep, has_stepped=has_stepped)
        self._snapshot = self._snapshot._replace(checksum=checksum, direction=direction)
        if timestep is not None:
            self._snapshot = self._snapshot._replace(given_timestep=timestep)

    def _direction_at(self, timestep: float, *, has_stepped: bool) -> int:
        """The direction up to this timestep. A new generation begins if it turns and no scheduler counts the steps."""
        last, direction = self._snapshot.timestep, direction_of(self._snapshot)
        sign = 0 if last is None or math.isnan(timestep) else (timestep > last) - (timestep < last)
        if sign * direction < 0 and not has_stepped:
            self._begin_generation("timestep-turned")
            return 0
        return sign or direction or int(has_stepped)

    def _begin_generation(self, reason: str) -> None:
        self._is_new, self._snapshot = True, Snapshot(began=reason)

    @property
    def _is_of_this_graph(self) -> bool:
        """Whether the cached values are from this graph, and from the present modules and weights."""
        now = (self._call.region_key, self._instance.weights_version)
        return (self._snapshot.graph, self._snapshot.weights_version) == now

    def _progress(self, config: CacheConfig, history: History) -> Progress | None:
        """The place of this step in the run of the scheduler; None outside of a pipeline."""
        if self._scheduler_run is None:
            return None
        # The timesteps only shorten a warm-up of 8 steps. With a mask, it ends with the leading 1s in any case.
        is_open = config.max_warmup_steps is None and config.steps_computation_mask is None
        reads = is_open and history.num_steps < DEFAULT_WARMUP_STEPS
        return self._scheduler_run.progress(history, reads_timesteps=reads)

    @property
    def _step_index(self) -> float:
        """How many steps the scheduler has made; 0 before it counts any."""
        run = self._scheduler_run
        return float(run.step_index or 0) if run is not None else 0.0

    def _has_gap(self, run: RegionRun) -> bool:
        """Whether steps of the session are missing before this one."""
        snapshot = self._snapshot
        if (
            self._is_placed
            and run.config.is_static
            and run.forecast is not None
            and run.forecast.forecaster.by == "step"
        ):
            return is_gap((*snapshot.step_indices[-4:], self._step_index))  # The timestep need not be read.
        return is_gap((*map(known, snapshot.timesteps[-4:]), snapshot.timestep))

    def _position(self, run: RegionRun) -> float:
        """The position of this step for the forecaster of the region (see `Times`)."""
        snapshot = self._snapshot
        if run.forecast is not None and run.forecast.forecaster.by == "timestep" and snapshot.timestep is not None:
            first = known(snapshot.timesteps[0]) if snapshot.timesteps else snapshot.timestep
            return abs(snapshot.timestep - first) if first is not None else float(snapshot.num_steps)
        return float(snapshot.num_steps)

    def discard(self) -> None:
        """Undoes the search for the session, because the step will be made again."""
        self._instance.undo_open(self._session)

    @property
    def has_decider(self) -> bool:
        """Whether a decider of the user decides. It has to be called once per step."""
        return self._policy.has_decider
