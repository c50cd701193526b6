"""One step of one session: the methods that a cached graph calls, and the commit to the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from cachedit_fx.forecasters.verdict import is_jump
from cachedit_fx.policies import (
    Decision,
    computes_anyway,
    decide,
    decide_unread,
    decision_terms,
    needs_refresh,
)
from cachedit_fx.runtime.cached_values import NONE_REUSED, CachedValue, Reused
from cachedit_fx.runtime.guidance import Following, are_alike, follow, pairs_of
from cachedit_fx.runtime.guidance_branch import LoopPosition
from cachedit_fx.runtime.host_memory import on_host
from cachedit_fx.runtime.host_read import HostRead, Unread, is_copied
from cachedit_fx.runtime.instance import Instance
from cachedit_fx.runtime.ranks import RANKS_DIFFER, fingerprint_of, vote
from cachedit_fx.runtime.region_run import (
    Policy,
    RegionRun,
    covered_live_outs,
    in_layout,
    is_moved_to_host,
    on_device,
    state_fits,
)
from cachedit_fx.runtime.scheduler_run import SchedulerRun
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.snapshot import Difference, RegionState
from cachedit_fx.runtime.step_session import ServedGraph, StepInSession
from cachedit_fx.runtime.stopwatch import StepTime


class StepRun(StepInSession):
    """One step of one session: the argument `step` of a cached graph. Changes nothing before `commit`."""

    __slots__ = ("_args", "_runs")

    def __init__(
        self,
        call: ServedGraph,
        policy: Policy,
        instance: Instance,
        opened: tuple[Session, LoopPosition],
        scheduler_run: SchedulerRun | None,
        args: Sequence[Any] | Mapping[int, Any],
    ) -> None:
        super().__init__(call, policy, instance, opened, scheduler_run)
        self._args = args
        self._runs: list[RegionRun] = []

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
            progress=self._progress(run.config, history),
        )
        if terms is not None:
            terms = (*terms, self._place, self._partner_diff(run))
        num_checksums = self._call.num_checksums if region == 0 else 0
        checksums = self._snapshot.checksum[::-1] or (0.0,) * num_checksums  # They were read from the end.
        asks = run.config.decider is not None or any(run.plan.measured)
        numbers = [float(asks), *fingerprint_of(terms), *checksums[:num_checksums]]
        return torch.tensor(numbers, dtype=torch.float32, device=run.plan.devices[-1])

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        """Whether to compute. Waits for the probe vector only if the decision depends on it (docs/reliability.md)."""
        run = self._run(region)
        if streams:
            run.sizes = run.plan.sizes_at(self._args, streams)
            run.fits = self._is_of_this_graph and state_fits(run.plan, run.config, run.state, run.sizes)
        if probe_vector is not None:
            run.read = self._host_read(probe_vector)
        if region == 0 and not self._is_timestep_set and not self._is_placed and self._computes_in_any_session(run):
            return True  # `update` reads, when the blocks are queued.
        decision = self._settle(region)
        return decision.compute

    def _computes_in_any_session(self, run: RegionRun) -> bool:
        """Whether the first region is computed, whichever session the timestep shows this step to be of."""
        history = run.state.history
        if not computes_anyway(
            run.config, history, is_cached=run.fits and not self._is_new, progress=self._progress(run.config, history)
        ):
            return False
        config = self._policy.config
        return not self._is_shared and not config.shadow and config.guidance_reuse == "off"

    def _settle(self, region: int) -> Decision:
        """Finds the session, if this is the first region, and makes the decision."""
        run = self._runs[region]
        if region == 0 and not self._is_timestep_set:
            self._set_timestep_of(run)
            if not self._was_predicted:  # The head compared with the probe of another session.
                read = run.read
                self._runs.clear()
                run = self._run(region)
                run.read = read
        if self._is_new:  # The cached values are those of the last generation.
            run.state, run.fits = RegionState(), False
        run.history, has_moved = run.state.history, self._snapshot.direction != 0
        if run.history.has_moved != has_moved:
            run.history = run.history._replace(has_moved=has_moved)
        run.following = self._follow(run)
        is_open = run.plan.groups or run.following is not None
        run.decision = None if is_open else self._decide_unread(run, region)
        if run.decision is None or (run.forecast is not None and not run.decision.compute):
            self._measure(run)
        if run.decision is None:
            own = partial(self._decide, run, region)
            asks = run.plan.groups and self._numbers(run)[run.plan.has_probe + 1]
            run.decision = vote(own, run.plan.groups, run.plan.devices[-1]) if asks else own()
        return run.decision

    def _measure(self, run: RegionRun) -> None:
        """Sets the residual diff, and whether the cached values are outdated. May wait for the device."""
        run.is_measured, plan = True, run.plan
        run.is_agreed = not plan.groups or (self._numbers(run)[plan.has_probe] == 1.0 and self._was_predicted)
        shared = self._shared_diff(run) if run.following is None else run.following.reference.diff
        if shared is not None:
            run.diff = shared
        elif (
            plan.has_probe and self._was_predicted and run.is_agreed and not (run.config.is_static and self._is_placed)
        ):
            run.diff = self._numbers(run)[0]
        if run.forecast is not None:
            run.is_outdated = run.state.is_outdated or self._has_gap(run) or is_jump(run.diff, run.state.diffs)

    @staticmethod
    def _numbers(run: RegionRun) -> list[float]:
        """The probe vector. The first access waits for the device."""
        return run.read.numbers if run.read is not None else []

    def _set_timestep_of(self, run: RegionRun) -> None:
        """Sets the timestep that is in the probe vector of the first region."""
        num_checksums, timestep = self._call.num_checksums, None
        if self._call.has_timestep and run.read is not None:
            timestep = Unread(run.read, -1 - num_checksums)
        checksum = tuple(self._numbers(run)[: -1 - num_checksums : -1]) if num_checksums else ()
        self.set_timestep(timestep, checksum)

    def _decide_unread(self, run: RegionRun, region: int) -> Decision | None:
        return decide_unread(
            run.config,
            run.history,
            is_cached=run.fits,
            earlier=self._earlier(region),
            progress=self._progress(run.config, run.history),
        )

    def _decide(self, run: RegionRun, region: int) -> Decision:
        progress, guided = self._progress(run.config, run.history), None
        if run.following is not None and run.fits and not self._has_gap(run):
            guided = run.following.decide(run.config, run.history, run.diff, progress)
        decision = guided or decide(
            run.config,
            run.history,
            run.diff,
            is_cached=run.fits,
            earlier=self._earlier(region),
            timestep=self._snapshot.timestep,
            region=run.plan.name,
            progress=progress,
        )
        return decision if run.is_agreed or (decision.compute and not decision.probed) else RANKS_DIFFER

    def _follow(self, run: RegionRun) -> Following | None:
        """How the region follows the guidance branch that was called first at this step."""
        if run.config.guidance_reuse == "off" or not self._was_predicted:
            return None
        find = partial(self._instance.reference, self._session, self._scheduler_run, self._snapshot.timestep)
        return follow(run.plan, run.config, run.state, find, self._instance.unguided)

    def _guided(self, run: RegionRun) -> tuple[torch.Tensor, ...]:
        """The residuals of a guided step; empty at other steps."""
        following = run.following
        if following is None or run.decision is None or not run.decision.is_guided:
            return ()
        if not following.residuals:
            now, parts = (
                self._position(run),
                zip(on_device(run, following.differences), covered_live_outs(run), strict=True),
            )
            differences = [
                value.at(now, NONE_REUSED, run.forecast if is_covered else None, is_outdated=run.is_outdated)
                for value, is_covered in parts
            ]
            pairs = pairs_of(following.reference.residuals, differences)
            following.residuals = tuple(self._call.weighted_sum(pair, (1.0, 1.0)) for pair in pairs)
        return following.residuals

    def _difference(self, run: RegionRun, residuals: tuple[torch.Tensor | None, ...]) -> Difference:
        """What guidance reuse stores after a computed or guided step with these residuals."""
        is_held = run.forecast is None or run.forecast.forecaster.holds_values
        own = tuple(value.last for value in run.state.cached) if is_held else tuple(map(self._copied, residuals))
        reference, before = run.following.reference if run.following else None, run.state.difference
        if run.decision is not None and run.decision.is_guided:
            return before._replace(own=own)
        if reference is None or not are_alike(reference.residuals, own):
            return Difference(own)
        now = tuple(self._call.weighted_sum(pair, (1.0, -1.0)) for pair in pairs_of(own, reference.residuals))
        is_continued = before.session == reference.session and are_alike(before.lasts, own)
        values = self._updated_values(run, now, before.values if is_continued else (), NONE_REUSED)
        return Difference(own, values, reference.session)

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
        now, covered = self._position(run), covered_live_outs(run)
        values = self._guided(run) or [
            cached.at(now, state.reused, run.forecast if is_covered else None, is_outdated=run.is_outdated)
            for cached, is_covered in zip(on_device(run, state.cached), covered, strict=True)
        ]
        sizes = run.sizes[run.plan.has_probe :]
        return tuple(in_layout(t, s[1]) if t is not None and s else t for t, s in zip(values, sizes, strict=True))

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        decision = self._runs[region].decision
        if decision is not None and not decision.compute:
            return after
        return after - before if after.shape == before.shape else None

    def update(self, region: int, probe: torch.Tensor | None, cached: tuple[torch.Tensor | None, ...]) -> None:
        run = self._runs[region]
        if run.decision is None:  # `decide` has put it off, since the step computes in any case.
            self._settle(region)
            run = self._runs[region]
        assert run.decision is not None
        if run.decision.compute and run.forecast is not None and not run.is_measured:
            self._measure(run)
        if run.decision.replaces_values:
            version = self._instance.weights_version
            self._snapshot = self._snapshot._replace(graph=self._call.region_key, weights_version=version)
            between = run.state.reused[0] if run.fits and not run.is_outdated else ()
            residuals = self._guided(run) or cached
            values = self._updated_values(run, residuals, run.state.cached, run.state.reused)
            run.state = run.state._replace(
                probe=self._copied(probe), cached=values, reused=((), between), is_outdated=False
            )
            if run.config.guidance_reuse != "off":
                run.state = run.state._replace(difference=self._difference(run, residuals))
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
            for cached, is_covered in zip(state.cached, covered_live_outs(run), strict=True)
            if is_covered
        ]
        unread = state.verdicts
        if not all(verdict is True for verdict in found):
            on_device = tuple(verdict for verdict in found if isinstance(verdict, torch.Tensor))
            is_known = any(verdict is False for verdict in found)  # The host knows that a stream was not forecast.
            unread = (*unread, (len(state.decisions), () if is_known else on_device))
        reused = ((*since, self._position(run)), between)
        return state._replace(reused=reused, is_outdated=run.is_outdated, verdicts=unread)

    def _updated_values(
        self, run: RegionRun, values: tuple[torch.Tensor | None, ...], before: tuple[CachedValue, ...], reused: Reused
    ) -> tuple[CachedValue, ...]:
        """The cached values after this computed step. Older values of another size, or before a gap or a jump, are
        dropped.
        """
        if not before or not run.fits or run.is_outdated:
            before = (CachedValue(),) * len(values)
        now, found, moves = self._position(run), [], is_moved_to_host(run)
        parts = zip(before, on_device(run, before), values, covered_live_outs(run), strict=True)
        for stored, old, value, is_covered in parts:
            cached = old.with_value(
                value,
                now,
                reused,
                run.forecast if is_covered else None,
                is_static=run.config.is_static,
            )
            places = {id(t): at for t, at in zip(old.tensors, stored.tensors, strict=True)}
            copied = on_host if moves else self._copied
            copies = (places[id(t)] if id(t) in places else copied(t) for t in cached.tensors)
            tensors = tuple(t for t in copies if t is not None)
            unread = None
            if run.forecast is not None and cached.positions:
                unread = run.forecast.functions.summary(cached.tensors)
            summary = self._host_read(unread) if unread is not None else None
            found.append(cached._replace(tensors=tensors, verdict=self._copied(cached.verdict), summary=summary))
        return tuple(found)

    def _copied(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """`tensor`, or a copy if the inner compiler will overwrite it."""
        return tensor.clone() if tensor is not None and self._call.copy_state else tensor

    def _host_read(self, tensor: torch.Tensor) -> HostRead:
        """A read of a tensor that the inner compiler may overwrite before the host needs it."""
        is_overwritten = self._call.copy_state and not is_copied(tensor)
        return HostRead(tensor.clone() if is_overwritten else tensor)

    def commit(self, step_time: StepTime) -> None:
        """Makes the step part of its session, with its `step_time`."""
        before = self._snapshot
        snapshot = before._replace(
            regions=MappingProxyType({**before.regions, **{run.plan.name: run.state for run in self._runs}}),
            num_steps=before.num_steps + 1,
            timesteps=(*before.timesteps, before.given_timestep),
            step_indices=(*before.step_indices, self._step_index),
            step_times=(*before.step_times, step_time),
        )
        is_first = before.num_steps == 0
        loop_position = self._loop_position.after(
            self._session.key.ordinal, before.given_timestep, self._scheduler_run, is_first=is_first
        )
        limit = self._policy.config.max_state_bytes
        self._instance.commit(self._session, snapshot, loop_position, is_new_generation=self._is_new, max_bytes=limit)

    @property
    def has_reused(self) -> bool:
        """Whether any region was reused."""
        reuses = any(run.decision is not None and not run.decision.compute for run in self._runs)
        return reuses and not self._policy.config.shadow

    def _run(self, region: int) -> RegionRun:
        """The run of a region in this step; created at the first access, in the order of the regions."""
        if region == len(self._runs):
            plan, config = self._call.regions[region], self._policy.regions[region]
            state = self._snapshot.regions.get(plan.name) or RegionState()
            if needs_refresh(config, state.history):
                state = state._replace(probe=None, cached=(), reused=((), ()), history=state.history.refreshed())
                state = state._replace(difference=Difference())
            sizes = plan.sizes_at(self._args)
            forecast = self._call.forecast(config.forecaster)
            fits = self._is_of_this_graph and state_fits(plan, config, state, sizes)
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
