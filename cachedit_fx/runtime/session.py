"""What exists between two calls: sessions, the cache state of one generation's one guidance branch."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cachedit_fx.config.cache_config import Changes
from cachedit_fx.runtime.bounds import MAX_SESSIONS as MAX_SESSIONS
from cachedit_fx.runtime.bounds import OVER, Bounds
from cachedit_fx.runtime.cached_values import NotForecast
from cachedit_fx.runtime.call_counts import CallTally
from cachedit_fx.runtime.conditioning import ConditioningTable
from cachedit_fx.runtime.guidance_branch import LOOP_START, GuidanceBranchKey, LoopPosition, SessionKey
from cachedit_fx.runtime.request import current_owner, current_request
from cachedit_fx.runtime.scheduler_run import SchedulerRun, find_scheduler_run
from cachedit_fx.runtime.snapshot import Snapshot
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.stopwatch import PieceTimes

MAX_FINISHED = 64  # Sessions per module whose statistics are kept.

_label: ContextVar[str | None] = ContextVar("cachedit_fx_label", default=None)
_call: ContextVar[ModelCall | None] = ContextVar("cachedit_fx_call", default=None)
_step_numbers = itertools.count(1)  # Numbers the steps of all sessions.


class ModelCall:
    """What a call of the whole model was given: for graphs that begin behind the model's first lines.

    Attributes:
        conditioning: The tensor whose identity tells requests and guidance branches apart.
        policy: When to reuse, whatever the graphs were compiled with; None for that.
        ran: Cached graphs that Dynamo ran during this call, each with its arguments and outputs.
        uncached_graphs: Graphs that ran without the cache during this call (`UncachedGraph`), each as often as it ran.
        num_served: Cached graphs that ran during this call, whoever ran them.
        has_reused: Whether one of these reused what was kept.
        instance: The sessions of the model; None where its weights tell.
    """

    __slots__ = (
        "_timestep",
        "conditioning",
        "has_reused",
        "instance",
        "num_served",
        "policy",
        "ran",
        "uncached_graphs",
    )

    def __init__(
        self,
        timestep: object,
        conditioning: torch.Tensor | None,
        policy: Changes | None = None,
        instance: Instance | None = None,
    ) -> None:
        self._timestep = timestep
        self.instance = instance
        self.conditioning = conditioning
        self.policy = policy
        self.ran: list[tuple[Any, tuple[Any, ...], Any]] = []
        self.uncached_graphs: list[Any] = []
        self.num_served, self.has_reused = 0, False

    @property
    def timestep(self) -> float | None:
        """The largest of the timesteps; None where the call has none. Reads from the device."""
        given = self._timestep
        if isinstance(given, torch.Tensor):
            return float(given.max()) if given.numel() else None
        if isinstance(given, np.ndarray):
            return float(given.max()) if given.size else None
        return float(given) if isinstance(given, numbers.Real) else None


def current_call() -> ModelCall | None:
    """The model call that this thread and async task is in, if someone told (see `within_call`)."""
    return _call.get()


@contextlib.contextmanager
def within_call(call: ModelCall) -> Iterator[None]:
    """Tells the graphs that run inside what the model was called with."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def set_label(label: str | None) -> None:
    """Names the guidance branch that this thread and async task calls the model for from now on; None for no name."""
    _label.set(label)


class Session:
    """One generation's one guidance branch. `snapshot` is all that changes, and what is counted of it.

    Attributes:
        first, last: Numbers of its first and its last step among those of all sessions; 0 before.
        num_bytes: What it keeps.
        bound: What the bounds on that did to it (`CacheStats.bound`).
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
                timesteps=list(self.snapshot.timesteps),
                thresholds={i: d.threshold for i, d in enumerate(state.decisions) if d.threshold is not None},
                step_seconds=PieceTimes(self.snapshot.piece_times),
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
    """What is known of a session, running or finished, and when it ran: numbers of its first and last step."""

    key: SessionKey
    first: int
    last: int
    stats: list[CacheStats]


class Instance:
    """All sessions of one module instance.

    Args:
        module: The module, where it is known.

    Attributes:
        bounds: How much the sessions may keep, and what was dropped.
        weights: Counts the times that modules or weights of the module were seen to be others.
        has_cached_graph: Whether a graph of the module has a conditional; where the cache is enabled, whether the last
            call ran such a graph.
        is_enabled: Whether `enable_cache` was called for the module, and `disable_cache` was not since.
        calls: How the calls of an enabled module were served.
        told: Kinds of reasons for running uncached that the user was told of.
    """

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        self._lock = threading.RLock()
        self._epoch = 0  # Counts the times that all sessions were ended.
        self._module = weakref.ref(module) if module is not None else None
        self.conditioning = ConditioningTable(self._conditioning_ended, self._lock, self._is_let_go)
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()  # The one used last stands last.
        self._loop_positions: dict[GuidanceBranchKey, LoopPosition] = {}  # Of the branches that have sessions, or had.
        self._finished: deque[Record] = deque(maxlen=MAX_FINISHED)
        self.bounds = Bounds()
        self.weights = 0
        self.has_cached_graph = self.is_enabled = False
        self.calls = CallTally()
        self.told: set[str] = set()

    def open(
        self, owner: Hashable, conditioning: torch.Tensor | None, scheduler_run: SchedulerRun | None = None
    ) -> tuple[Session, LoopPosition]:
        """The session that this call seems to belong to, and where its branch stands; nothing changes before `commit`.

        Which of a step's calls it is, is known for certain once its timestep is: see `at`.
        """
        token = self.conditioning.token(conditioning) if conditioning is not None else None
        request = current_request()
        key = GuidanceBranchKey(owner, current_owner(request), _label.get(), token)
        with self._lock:
            loop_position = self._loop_positions.get(key) or self._loop_positions.get(
                key._replace(owner=None), LOOP_START
            )
            predicted = SessionKey(key, loop_position.predicted_ordinal(scheduler_run))
            known = self._sessions.get(predicted)
        return known or Session(predicted, request, self._epoch), loop_position

    def at(self, session: Session, ordinal: int) -> Session:
        """The session of another of the calls that the branch of `session` makes at a step."""
        key = SessionKey(session.key.guidance_branch, ordinal)
        with self._lock:
            known = self._sessions.get(key)
        return known or Session(key, session.request, session.epoch)

    def pass_by(self, call: ModelCall) -> None:
        """Counts a call that none of the graphs served: what follows at the same step is not taken for it."""
        token = self.conditioning.token(call.conditioning) if call.conditioning is not None else None
        scheduler_run, timestep = find_scheduler_run(), call.timestep
        mine = GuidanceBranchKey(None, current_owner(current_request()), _label.get(), token)
        with self._lock:
            for key in [mine, *(key for key in self._loop_positions if key._replace(owner=None) == mine)]:
                loop_position = self._loop_positions.get(key, LOOP_START)
                ordinal = loop_position.ordinal_at(timestep, scheduler_run)
                self._loop_positions.pop(key, None)
                self._loop_positions[key] = loop_position.after(
                    ordinal, timestep, scheduler_run, is_first=loop_position is LOOP_START
                )
            self._bound_loop_positions()

    def take_back(self, session: Session) -> None:
        """Undoes `open` for a call that was given up and will be made anew: its prompt has not served it."""
        token = session.key.guidance_branch.token
        if token is not None:
            self.conditioning.take_back(token)

    def partner(self, session: Session) -> Session | None:
        """The session of another guidance branch of the same request that made the last step before this."""
        mine, ordinal = session.key.guidance_branch, session.key.ordinal

        def is_partner(key: SessionKey) -> bool:
            other = key.guidance_branch
            same = (other.owner, other.who, key.ordinal) == (mine.owner, mine.who, ordinal)
            return same and other != mine

        with self._lock:
            return next((s for key, s in reversed(self._sessions.items()) if is_partner(key)), None)

    def commit(
        self,
        session: Session,
        snapshot: Snapshot,
        loop_position: LoopPosition,
        *,
        is_new_generation: bool,
        max_bytes: int | None = None,
    ) -> None:
        """Takes a finished step. A new generation under an old key ends the old session first.

        Args:
            loop_position: Where the branch stands now.
            max_bytes: That all sessions may keep; None for any number.
        """
        with self._lock:
            if session.epoch != self._epoch:
                return  # Reset while the step ran: what it would keep was to go.
            if is_new_generation:
                self._end_generation_of(session)
                session = Session(session.key, session.request, session.epoch)
            is_going_on = (
                self.bounds.is_going_on(session.key, snapshot.timestep, loop_position) and not is_new_generation
            )
            if is_going_on and not session.first:
                self.bounds.warn()
                snapshot = snapshot._replace(began="state-dropped")
            self._loop_positions[session.key.guidance_branch] = loop_position
            session.last = next(_step_numbers)
            session.first = session.first or session.last
            session.snapshot = snapshot
            session.num_bytes = sum(region.num_bytes for region in snapshot.regions.values())
            self._sessions[session.key] = session
            self._sessions.move_to_end(session.key)
            for old, why in self.bounds.too_much([*self._sessions.values()], self._loop_positions, session, max_bytes):
                self._drop(old, why)
            session.bound = OVER if self.bounds.over else ""

    def records(self) -> list[Record]:
        """All sessions that are running, and the latest of those that are finished."""
        with self._lock:
            return [*self._finished, *(self._record(session, finished=False) for session in self._sessions.values())]

    def end(self, *, everyone: bool) -> None:
        """Ends the sessions of the request (or the thread and async task) that asks, or all.

        A pipeline ends its own: another one may be in the middle of its loop, further up the stack.
        """
        scheduler_run, who = find_scheduler_run(), current_owner(current_request())

        def is_asked(guidance_branch: GuidanceBranchKey) -> bool:
            loop_position = self._loop_positions.get(guidance_branch, LOOP_START)
            is_other = (
                scheduler_run is not None
                and loop_position.scheduler_run is not None
                and not loop_position.goes_on_in(scheduler_run)
            )
            return guidance_branch.who == who and not is_other

        with self._lock:
            self._epoch += everyone  # So that steps that are running now leave nothing behind.
            for session in [s for s in self._sessions.values() if everyone or is_asked(s.key.guidance_branch)]:
                self._finish(session)
            self._forget_loop_positions(lambda guidance_branch: everyone or is_asked(guidance_branch))

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            self._sessions.clear()
            self._loop_positions.clear()
            self._finished.clear()
            self.bounds = Bounds()
            self.conditioning.clear()
        self.calls.clear()

    def _end_generation_of(self, session: Session) -> None:
        """Ends what the session did before, and with the first of a step's calls what the further ones did."""
        guidance_branch, ordinal = session.key.guidance_branch, session.key.ordinal
        ended = [
            s
            for k, s in self._sessions.items()
            if k.guidance_branch == guidance_branch and (k.ordinal == ordinal or not ordinal)
        ]
        for old in ended:
            self._finish(old)

    def _drop(self, session: Session, why: str) -> None:
        """Lets go of a session whose generation may go on: its branch keeps its turn, for it may be within a step."""
        guidance_branch, loop_position = session.key.guidance_branch, self._loop_positions[session.key.guidance_branch]
        session.bound, snapshot = why, session.snapshot
        self._finish(session)
        self.bounds.drop(session.key, snapshot.timestep, snapshot.direction, why)
        self._loop_positions.pop(guidance_branch, None)
        self._loop_positions[guidance_branch] = loop_position
        self._bound_loop_positions()

    def _bound_loop_positions(self) -> None:
        """Lets go of those that were used least recently, of branches without sessions."""
        have_sessions = {key.guidance_branch for key in self._sessions}
        for guidance_branch in [b for b in self._loop_positions if b not in have_sessions][:-MAX_SESSIONS]:
            del self._loop_positions[guidance_branch]

    def _finish(self, session: Session) -> None:
        self._finished.append(self._record(session, finished=True))
        self._sessions.pop(session.key, None)
        self._forget_loop_positions(lambda guidance_branch: guidance_branch == session.key.guidance_branch)
        session.snapshot, session.num_bytes = Snapshot(), 0

    def _forget_loop_positions(self, is_meant: Callable[[GuidanceBranchKey], bool]) -> None:
        """Those of branches without sessions."""
        have_sessions = {key.guidance_branch for key in self._sessions}
        for guidance_branch in [b for b in self._loop_positions if is_meant(b) and b not in have_sessions]:
            del self._loop_positions[guidance_branch]

    def _record(self, session: Session, *, finished: bool) -> Record:
        num_dropped = self.bounds.dropped.total()
        return Record(
            session.key, session.first, session.last, session.stats(finished=finished, num_dropped=num_dropped)
        )

    def _is_let_go(self, tensor: torch.Tensor, references: int) -> bool:
        """Whether all references to `tensor` are the module's own, as where a model stores its context on itself."""
        module = self._module() if self._module is not None else None
        if module is None:
            return False
        return 0 < references == sum(value is tensor for inner in module.modules() for value in vars(inner).values())

    def _conditioning_ended(self, token: int) -> None:
        with self._lock:
            for session in [s for s in self._sessions.values() if s.key.guidance_branch.token == token]:
                self._finish(session)
            self._forget_loop_positions(lambda guidance_branch: guidance_branch.token == token)
