"""One step of one session: the methods that a cached graph calls, and the commit to the session."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.verdict import is_gap, is_jump
from cachedit_fx.passes.analysis.runtime_plan import PartialSizes, RegionPlan
from cachedit_fx.policies import Decision, History, Progress, decide, decision_terms, needs_refresh
from cachedit_fx.runtime.cached_values import CachedValue, Forecast
from cachedit_fx.runtime.guidance_branch import LoopPosition
from cachedit_fx.runtime.host_memory import HOST, is_moved, on_device, on_host
from cachedit_fx.runtime.instance import Instance
from cachedit_fx.runtime.ranks import RANKS_DIFFER, fingerprint_of, vote
from cachedit_fx.runtime.scheduler_run import SchedulerRun
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.snapshot import RegionState, Snapshot
from cachedit_fx.runtime.stopwatch import StepTime


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


class ServedGraph(Protocol):
    """What a step asks of the cached graph that it is a step of (see `CachedCall`)."""

    regions: tuple[RegionPlan, ...]
    region_key: int
    has_timestep: bool
    num_checksums: int
    copy_state: bool

    def forecast(self, forecaster: Forecaster | None) -> Forecast | None: ...


class StepRun:
    """One step of one session: the argument `step` of a cached graph. Changes nothing before `commit`."""

    __slots__ = (
        *("_args", "_call", "_instance", "_is_new", "_policy", "_runs", "_scheduler_run", "_session", "_snapshot"),
        *("_is_timestep_set", "_loop_position", "_was_predicted"),
    )

    def __init__(
        self,
        call: ServedGraph,
        policy: Policy,
        instance: Instance,
        opened: tuple[Session, LoopPosition],
        scheduler_run: SchedulerRun | None,
        args: Sequence[Any] | Mapping[int, Any],
    ) -> None:
        self._call, self._policy, self._instance, self._args = call, policy, instance, args
        self._scheduler_run = scheduler_run
        self._session, self._loop_position = opened
        self._is_timestep_set, self._was_predicted = False, True
        self._runs: list[RegionRun] = []
        self._use_session(self._session)

    def _use_session(self, session: Session) -> None:
        """Makes this a step of `session`."""
        self._session, self._snapshot, self._is_new = session, session.snapshot, False
        length = self._policy.config.num_inference_steps
        if not self._loop_position.continues_in(self._scheduler_run):
            self._begin_generation("new-schedule" if session.first else "new")
        elif length is not None and self._scheduler_run is None and session.snapshot.num_steps >= length:
            self._begin_generation("length-reached")

    def before(self, region: int) -> torch.Tensor:
        """The probe at the last computed step (with a budget: at the last step); zeros if there is none to compare."""
        run = self._run(region)
        shape, strides = run.sizes[0] or ((), ())  # The size of a probe does not depend on data.
        if run.fits and run.state.probe is not None:
            return in_layout(run.state.probe, strides)
        return torch.empty_strided(shape, strides, dtype=run.plan.dtypes[0], device=run.plan.devices[0]).zero_()

    def fingerprint(self, region: int) -> torch.Tensor:
        """What the decision depends on besides the probe vector (see `Step.fingerprint`)."""
        run = self._run(region)
        is_cached = run.fits and not self._is_new
        history = run.state.history
        terms = decision_terms(
            run.config,
            history,
            is_cached=is_cached,
            earlier=self._earlier(region),
            progress=self._progress(history),
        )
        if terms is not None:
            terms = (*terms, self._place, self._partner_diff(run))
        num_checksums = self._call.num_checksums if region == 0 else 0
        checksums = self._snapshot.checksum[::-1] or (0.0,) * num_checksums  # They were read from the end.
        asks = run.config.decider is not None or any(run.plan.measured)
        numbers = [float(asks), *fingerprint_of(terms), *checksums[:num_checksums]]
        return torch.tensor(numbers, dtype=torch.float32, device=run.plan.devices[-1])

    @property
    def _place(self) -> tuple[object, ...]:
        """Where this step is in its session and its loop, as far as `set_timestep` depends on it."""
        session, snapshot, position, run = self._session, self._snapshot, self._loop_position, self._scheduler_run
        in_loop = (position.timestep, position.calls, position.is_next_step(run), position.continues_in(run))
        return (session.key.ordinal, session.is_named, snapshot.timestep, snapshot.direction, *in_loop)

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        """Whether to compute. Reads the probe vector, which is the only synchronization with the device per region."""
        run = self._run(region)
        if streams:
            run.sizes = run.plan.sizes_at(self._args, streams)
            run.fits = self._is_of_this_graph and _fits(run.plan, run.config, run.state, run.sizes)
        values = probe_vector.tolist() if probe_vector is not None else []
        if region == 0 and not self._is_timestep_set:
            checksum = tuple(values.pop() for _ in range(self._call.num_checksums))
            self.set_timestep(values.pop() if self._call.has_timestep else None, checksum)
            if not self._was_predicted:  # The head compared with the probe of another session.
                self._runs.clear()
                run = self._run(region)
        if self._is_new:  # The cached values are those of the last generation.
            run.state, run.fits = RegionState(), False
        is_equal, asks = values[run.plan.has_probe :] if run.plan.groups else (1.0, 0.0)
        run.is_agreed = not run.plan.groups or (is_equal == 1.0 and self._was_predicted)
        diff = values[0] if run.plan.has_probe and self._was_predicted and run.is_agreed else math.nan
        shared = self._shared_diff(run)
        run.diff = diff if shared is None else shared
        if run.forecast is not None:
            run.is_outdated = run.state.is_outdated or self._has_gap() or is_jump(run.diff, run.state.diffs)
        run.history, has_moved = run.state.history, self._snapshot.direction != 0
        if run.history.has_moved != has_moved:
            run.history = run.history._replace(has_moved=has_moved)
        own = partial(self._decide, run, region)
        run.decision = vote(own, run.plan.groups, run.plan.devices[-1]) if asks else own()
        return run.decision.compute

    def _decide(self, run: RegionRun, region: int) -> Decision:
        decision = decide(
            run.config,
            run.history,
            run.diff,
            is_cached=run.fits,
            earlier=self._earlier(region),
            timestep=self._snapshot.timestep,
            region=run.plan.name,
            progress=self._progress(run.history),
        )
        return decision if run.is_agreed or (decision.compute and not decision.probed) else RANKS_DIFFER

    def _progress(self, history: History) -> Progress | None:
        """The place of this step in the run of the scheduler; None outside of a pipeline."""
        return None if self._scheduler_run is None else self._scheduler_run.progress(history.number)

    def _earlier(self, region: int) -> list[float]:
        """The residual diffs of the previous regions at this step."""
        return [run.diff for run in self._runs[:region] if run.decision is not None and run.decision.probed]

    def cached(self, region: int) -> tuple[torch.Tensor | None, ...]:
        run = self._runs[region]
        if run.decision is None or run.decision.compute:
            return (None,) * (len(run.plan.dtypes) - run.plan.has_probe)
        return self.reusable(run, run.state)

    def reusable(self, run: RegionRun, state: RegionState) -> tuple[torch.Tensor | None, ...]:
        """The cached values of `state` for a reused step, in the layout of this call."""
        now, covered = self._position(run), _covered(run)
        values = [
            cached.at(now, state.reused, run.forecast if is_covered else None, is_outdated=run.is_outdated)
            for cached, is_covered in zip(_on_device(run, state.cached), covered, strict=True)
        ]
        sizes = run.sizes[run.plan.has_probe :]
        return tuple(in_layout(t, s[1]) if t is not None and s else t for t, s in zip(values, sizes, strict=True))

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        decision = self._runs[region].decision
        assert decision is not None
        if not decision.compute:
            return after
        return after - before if after.shape == before.shape else None

    def update(self, region: int, probe: torch.Tensor | None, cached: tuple[torch.Tensor | None, ...]) -> None:
        run = self._runs[region]
        assert run.decision is not None
        if run.decision.compute:
            version = self._instance.weights_version
            self._snapshot = self._snapshot._replace(graph=self._call.region_key, weights_version=version)
            between = run.state.reused[0] if run.fits and not run.is_outdated else ()
            values = self._updated_values(run, cached)
            run.state = run.state._replace(
                probe=self._copied(probe), cached=values, reused=((), between), is_outdated=False
            )
        else:
            if run.config.decision_rule == "budget":
                run.state = run.state._replace(probe=self._copied(probe))
            if run.forecast is not None:
                run.state = self._after_reuse(run)
        run.state = run.state._replace(
            history=run.history.after(run.decision),
            decisions=(*run.state.decisions, run.decision),
            diffs=(*run.state.diffs, run.diff),
        )

    def _after_reuse(self, run: RegionRun) -> RegionState:
        """The state after a reused step of a region with a forecaster."""
        assert run.forecast is not None
        (since, between), state = run.state.reused, run.state
        found = [
            cached.verdict_at(run.forecast, is_outdated=run.is_outdated)
            for cached, is_covered in zip(state.cached, _covered(run), strict=True)
            if is_covered
        ]
        unread = state.verdicts
        if not all(verdict is True for verdict in found):
            on_device = tuple(verdict for verdict in found if isinstance(verdict, torch.Tensor))
            is_known = any(verdict is False for verdict in found)  # The host knows that a stream was not forecast.
            unread = (*unread, (len(state.decisions), () if is_known else on_device))
        reused = ((*since, self._position(run)), between)
        return state._replace(reused=reused, is_outdated=run.is_outdated, verdicts=unread)

    def _has_gap(self) -> bool:
        """Whether steps of the session are missing before this one."""
        snapshot = self._snapshot
        return is_gap((*snapshot.timesteps[-4:], snapshot.timestep))

    def _updated_values(self, run: RegionRun, values: tuple[torch.Tensor | None, ...]) -> tuple[CachedValue, ...]:
        """The cached values after this computed step. Older values of another size, or before a gap or a jump, are
        dropped.
        """
        is_continued = run.fits and not run.is_outdated
        before = run.state.cached if is_continued else (CachedValue(),) * len(values)
        now, found, moves = self._position(run), [], _is_moved(run)
        for stored, old, value, is_covered in zip(before, _on_device(run, before), values, _covered(run), strict=True):
            cached = old.with_value(
                value,
                now,
                run.state.reused,
                run.forecast if is_covered else None,
                is_static=run.config.is_static,
            )
            known = {id(t): at for t, at in zip(old.tensors, stored.tensors, strict=True)}
            copied = on_host if moves else self._copied
            copies = (known[id(t)] if id(t) in known else copied(t) for t in cached.tensors)
            tensors = tuple(t for t in copies if t is not None)
            found.append(cached._replace(tensors=tensors, verdict=self._copied(cached.verdict)))
        return tuple(found)

    def _copied(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """`tensor`, or a copy if the inner compiler will overwrite it."""
        return tensor.clone() if tensor is not None and self._call.copy_state else tensor

    def _position(self, run: RegionRun) -> float:
        """The position of this step for the forecaster of the region (see `Times`)."""
        snapshot = self._snapshot
        if run.forecast is not None and run.forecast.forecaster.by == "timestep" and snapshot.timestep is not None:
            first = snapshot.timesteps[0] if snapshot.timesteps else snapshot.timestep
            return abs(snapshot.timestep - first) if first is not None else float(snapshot.num_steps)
        return float(snapshot.num_steps)

    def commit(self, step_time: StepTime) -> None:
        """Makes the step part of its session, with its `step_time`."""
        before = self._snapshot
        snapshot = before._replace(
            regions=MappingProxyType({**before.regions, **{run.plan.name: run.state for run in self._runs}}),
            num_steps=before.num_steps + 1,
            timesteps=(*before.timesteps, before.timestep),
            step_times=(*before.step_times, step_time),
        )
        is_first = before.num_steps == 0
        loop_position = self._loop_position.after(
            self._session.key.ordinal, before.timestep, self._scheduler_run, is_first=is_first
        )
        limit = self._policy.config.max_state_bytes
        self._instance.commit(self._session, snapshot, loop_position, is_new_generation=self._is_new, max_bytes=limit)

    def discard(self) -> None:
        """Undoes the search for the session, because the step will be made again."""
        self._instance.undo_open(self._session)

    @property
    def has_reused(self) -> bool:
        """Whether any region was reused."""
        reuses = any(run.decision is not None and not run.decision.compute for run in self._runs)
        return reuses and not self._policy.config.shadow

    @property
    def has_decider(self) -> bool:
        """Whether a decider of the user decides. It has to be called once per step."""
        return self._policy.has_decider

    def set_timestep(self, timestep: float | None, checksum: tuple[float, ...] = ()) -> None:
        """Sets the timestep of the step, which determines its ordinal and may begin a new generation.

        A new generation begins if the timestep turns back, or if the conditioning has other values in the same tensor.
        In one run of a pipeline, the step index of the scheduler counts instead: the timestep may turn or stay.
        """
        self._is_timestep_set = True
        ordinal = self._loop_position.ordinal_at(timestep, self._scheduler_run)
        if ordinal != self._session.key.ordinal:
            self._was_predicted = False
            self._use_session(self._instance.at(self._session, ordinal))
        if self._snapshot.checksum not in ((), checksum):
            self._begin_generation("conditioning-changed")
        last, direction = self._snapshot.timestep, self._snapshot.direction
        has_stepped = self._loop_position.is_next_step(self._scheduler_run) and not self._is_new
        if timestep is None:
            # Without a timestep, the steps of a named request, or of one run of a scheduler, are one generation.
            is_known = self._session.is_named or has_stepped
            self._snapshot = self._snapshot._replace(checksum=checksum, direction=int(is_known))
            return
        sign = 0 if last is None or math.isnan(timestep) else (timestep > last) - (timestep < last)
        if sign * direction < 0 and not has_stepped:
            self._begin_generation("timestep-turned")
            sign, direction = 0, 0
        direction = sign or direction or int(has_stepped)
        self._snapshot = self._snapshot._replace(checksum=checksum, timestep=timestep, direction=direction)

    def _begin_generation(self, reason: str) -> None:
        self._is_new, self._snapshot = True, Snapshot(began=reason)

    @property
    def _is_of_this_graph(self) -> bool:
        """Whether the cached values are from this graph, and from the present modules and weights."""
        now = (self._call.region_key, self._instance.weights_version)
        return (self._snapshot.graph, self._snapshot.weights_version) == now

    def _run(self, region: int) -> RegionRun:
        """The run of a region in this step; created at the first access, in the order of the regions."""
        if region == len(self._runs):
            plan, config = self._call.regions[region], self._policy.regions[region]
            state = self._snapshot.regions.get(plan.name) or RegionState()
            if needs_refresh(config, state.history):
                state = state._replace(probe=None, cached=(), reused=((), ()), history=state.history.refreshed())
            sizes = plan.sizes_at(self._args)
            forecast = self._call.forecast(config.forecaster)
            fits = self._is_of_this_graph and _fits(plan, config, state, sizes)
            self._runs.append(RegionRun(plan, config, state, sizes, fits, forecast))
        return self._runs[region]

    def _shared_diff(self, run: RegionRun) -> float | None:
        """The residual diff of the other guidance branch at this step, if this branch uses it; otherwise None."""
        found = self._partner_diff(run)
        return found[1] if found is not None and found[0] == self._snapshot.timestep else None

    def _partner_diff(self, run: RegionRun) -> tuple[float | None, float] | None:
        """The timestep and the residual diff of the other guidance branch, if it is one step ahead and this one uses
        them."""
        config = self._policy.config
        if config.cfg_diff_compute_separate or config.enable_separate_cfg is False or config.cfg_compute_first:
            return None
        partner = self._instance.partner(self._session)
        other = partner.snapshot.regions.get(run.plan.name) if partner is not None else None
        if partner is None or other is None or not other.decisions:
            return None
        is_ahead = len(other.decisions) == len(run.state.decisions) + 1
        return (partner.snapshot.timestep, other.diffs[-1]) if is_ahead and other.decisions[-1].probed else None


def _covered(run: RegionRun) -> tuple[bool, ...]:
    """Which live-outs of the region are forecast."""
    return run.forecast.covers(run.plan.roles) if run.forecast is not None else (False,) * len(run.plan.roles)


def _is_moved(run: RegionRun) -> bool:
    """Whether the cached values of the region are in host memory between two steps."""
    return run.config.cache_device is not None and is_moved(run.plan.devices[-1])


def _on_device(run: RegionRun, cached: tuple[CachedValue, ...]) -> tuple[CachedValue, ...]:
    """The cached values on the devices of the region."""
    if not _is_moved(run):
        return cached
    devices = run.plan.devices[run.plan.has_probe :]
    return tuple(on_device(value, device) for value, device in zip(cached, devices, strict=False))


def _fits(plan: RegionPlan, config: CacheConfig, state: RegionState, sizes: PartialSizes) -> bool:
    """Whether everything is cached, in the sizes that are known so far."""
    others = () if config.cache_device is None else (HOST,)
    tensors = (*((state.probe,) if plan.has_probe else ()), *(cached.last for cached in state.cached))
    return len(tensors) == len(plan.dtypes) and all(
        tensor is not None
        and (size is None or tensor.shape == size[0])
        and tensor.dtype == dtype
        and tensor.device in (device, *others)
        for tensor, size, dtype, device in zip(tensors, sizes, plan.dtypes, plan.devices, strict=True)
    )
