"""What exists between two calls: sessions, the cache state of one generation's one guidance branch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.clock import Lap, Laps
from cachedit_fx.conditioning import ConditioningTable
from cachedit_fx.config import Changes
from cachedit_fx.errors import shown
from cachedit_fx.kept import Kept, NotForecast, Reused, Unread
from cachedit_fx.policies import Decision, History
from cachedit_fx.stats import CacheStats, StepError

MAX_SESSIONS = 64  # Per module; beyond it the one that was used least recently ends.
MAX_FINISHED = 64  # Sessions per module whose statistics are kept.

_request: ContextVar[Hashable | None] = ContextVar("cachedit_fx_request", default=None)
_label: ContextVar[str | None] = ContextVar("cachedit_fx_label", default=None)
_call: ContextVar[ModelCall | None] = ContextVar("cachedit_fx_call", default=None)
_clock = itertools.count(1)  # Numbers the steps of all sessions.


class ModelCall:
    """What a call of the whole model was given: for graphs that begin behind the model's first lines.

    Attributes:
        conditioning: The tensor whose identity tells requests and guidance branches apart.
        policy: When to reuse, whatever the graphs were compiled with; None for that.
        ran: Guarded graphs that Dynamo ran during this call, each with its arguments and outputs.
        misses: Of graphs that were compiled during this call and run uncached, the number of nodes and the reason.
    """

    __slots__ = ("_timestep", "conditioning", "misses", "policy", "ran")

    def __init__(
        self,
        timestep: object,
        conditioning: torch.Tensor | None,
        policy: Changes | None = None,
    ) -> None:
        self._timestep = timestep
        self.conditioning = conditioning
        self.policy = policy
        self.ran: list[tuple[Any, tuple[Any, ...], Any]] = []
        self.misses: list[tuple[int, str]] = []

    @property
    def timestep(self) -> float | None:
        """The largest of the timesteps. Reads from the device."""
        if isinstance(self._timestep, torch.Tensor):
            return float(self._timestep.max())
        return float(self._timestep) if isinstance(self._timestep, int | float) else None


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


@contextlib.contextmanager
def session(key: Hashable) -> Iterator[None]:
    """Names the request that the calls inside belong to, in this thread and async task.

    Steps of one request may come from several threads and between those of others; guidance branches inside it are
    told apart by their conditioning. Leaving the block ends nothing: a server may enter it anew for every step.

    Raises:
        TypeError: `key` is not hashable, or None.
    """
    if key is None or not _is_hashable(key):
        raise TypeError(
            f"cachedit_fx: session(key) takes any hashable key but None, as a string or a number, got {shown(key)}"
        )
    token = _request.set(key)
    try:
        yield
    finally:
        _request.reset(token)


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class RegionState:
    """What one region keeps from its last computed steps, and the record of its decisions.

    Attributes:
        seen: What the guard looked at, at the last computed step or, where a budget decides, at the last step; None
            before the first, or where it looks at nothing.
        stored: One per value that leaves the region; none before the first computed step.
        reused: Positions of the steps reused since the last computed one, and of those between it and the computed one
            before it; for a forecaster alone.
        is_outdated: Whether a gap or a jump has come since the last computed step.
        verdicts: Of the reused steps that may not have used the forecaster.
    """

    seen: torch.Tensor | None = None
    stored: tuple[Kept, ...] = ()
    reused: Reused = ((), ())
    history: History = field(default_factory=History)
    decisions: tuple[Decision, ...] = ()
    diffs: tuple[float, ...] = ()
    errors: tuple[StepError | None, ...] = ()
    is_outdated: bool = False
    verdicts: tuple[Unread, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self.stored) + (self.seen.nbytes if self.seen is not None else 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session between two steps. Replaced as a whole, so that a step that raises leaves nothing behind.

    Attributes:
        timestep: Of the last step; None before the first, or where the graph has no such input.
        direction: Sign in which the timestep moves; 0 while it has not.
        num_steps: Steps so far.
        began: Why the generation began (see `CacheStats.began`).
        timesteps, laps: Of every step.
    """

    timestep: float | None = None
    direction: int = 0
    num_steps: int = 0
    began: str = "new"
    timesteps: tuple[float | None, ...] = ()
    laps: tuple[Lap, ...] = ()
    regions: Mapping[str, RegionState] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What tells one session of a module from another.

    Attributes:
        owner: Whoever compiled the graph: two configurations share nothing.
        who: The request's name, or the thread and async task.
        label: What the pipeline calls this guidance branch.
        token: Number of the conditioning.
    """

    owner: Hashable
    who: Hashable
    label: str | None
    token: int | None


class Session:
    """One generation's one guidance branch. `snapshot` is all that changes."""

    __slots__ = ("epoch", "first", "key", "last", "request", "snapshot")

    def __init__(self, key: SessionKey, request: Hashable | None, epoch: int) -> None:
        self.epoch = epoch
        self.key = key
        self.request = request
        self.first = self.last = 0  # Numbers of its first and its last step among those of all sessions.
        self.snapshot = Snapshot()

    @property
    def is_named(self) -> bool:
        """Whether a `session(key)` names its request."""
        return self.request is not None

    @property
    def name(self) -> str:
        branch = self.key.label or ("" if self.key.token is None else f"conditioning {self.key.token}")
        named = "" if self.request is None else str(self.request)
        return ", ".join(filter(None, (named, branch))) or "unnamed"

    def stats(self, *, finished: bool) -> list[CacheStats]:
        return [
            CacheStats(
                region=name,
                session=self.name,
                num_steps=len(state.decisions),
                cached_steps=[i for i, decision in enumerate(state.decisions) if not decision.compute],
                residual_diffs={i: d for i, d in enumerate(state.diffs) if state.decisions[i].looked},
                decisions=[decision.reason for decision in state.decisions],
                state_bytes=0 if finished else state.num_bytes,
                peak_state_bytes=state.num_bytes,
                began=self.snapshot.began,
                timesteps=list(self.snapshot.timesteps),
                thresholds={i: d.threshold for i, d in enumerate(state.decisions) if d.threshold is not None},
                step_seconds=Laps(self.snapshot.laps),
                errors={i: error for i, error in enumerate(state.errors) if error is not None},
                accumulated={i: d.accumulated for i, d in enumerate(state.decisions) if d.accumulated is not None},
                not_forecast=NotForecast(state.verdicts),
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
    """All sessions of one module instance."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._epoch = 0  # Counts the times that all sessions were ended.
        self.conditioning = ConditioningTable(self._conditioning_ended, self._lock)
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()  # The one used last stands last.
        self._finished: deque[Record] = deque(maxlen=MAX_FINISHED)

    def open(self, owner: Hashable, conditioning: torch.Tensor | None) -> Session:
        """The session that this call belongs to; a new one is not kept before `commit`."""
        token = self.conditioning.token(conditioning) if conditioning is not None else None
        key = SessionKey(owner, _who(), _label.get(), token)
        with self._lock:
            known = self._sessions.get(key)
        return known or Session(key, _request.get(), self._epoch)

    def partner(self, session: Session) -> Session | None:
        """The session of another guidance branch of the same request that made the last step before this."""
        owner, who = session.key.owner, session.key.who
        with self._lock:
            others = (s for s in reversed(self._sessions.values()) if s is not session)
            return next((s for s in others if s.key.owner == owner and s.key.who == who), None)

    def commit(self, session: Session, snapshot: Snapshot, *, is_new_generation: bool) -> None:
        """Takes a finished step. A new generation under an old key ends the old session first."""
        with self._lock:
            if session.epoch != self._epoch:
                return  # Reset while the step ran: what it would keep was to go.
            if is_new_generation and session.first:
                self._finish(session)
                session = Session(session.key, session.request, session.epoch)
            session.last = next(_clock)
            session.first = session.first or session.last
            session.snapshot = snapshot
            self._sessions[session.key] = session
            self._sessions.move_to_end(session.key)
            while len(self._sessions) > MAX_SESSIONS:
                self._finish(next(iter(self._sessions.values())))

    def records(self) -> list[Record]:
        """All sessions that are running, and the latest of those that are finished."""
        with self._lock:
            return [*self._finished, *(self._record(session, finished=False) for session in self._sessions.values())]

    def end(self, *, everyone: bool) -> None:
        """Ends the sessions of the request (or the thread and async task) that asks, or all."""
        with self._lock:
            self._epoch += everyone  # So that steps that are running now leave nothing behind.
            for session in [s for s in self._sessions.values() if everyone or s.key.who == _who()]:
                self._finish(session)

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            self._sessions.clear()
            self._finished.clear()
            self.conditioning.clear()

    def _finish(self, session: Session) -> None:
        self._finished.append(self._record(session, finished=True))
        self._sessions.pop(session.key, None)
        session.snapshot = Snapshot()

    @staticmethod
    def _record(session: Session, *, finished: bool) -> Record:
        return Record(session.key, session.first, session.last, session.stats(finished=finished))

    def _conditioning_ended(self, token: int) -> None:
        with self._lock:
            for session in [s for s in self._sessions.values() if s.key.token == token]:
                self._finish(session)


def _who() -> Hashable:
    """Whose generation this is: without a name, another thread or task is another request, even with one prompt."""
    request = _request.get()
    if request is not None:
        return ("named", request)
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return ("thread", threading.get_ident(), id(task) if task is not None else None)


# One instance is told from another by a weight of its chain: two instances of a class share one compiled graph.
_instances: Any = WeakIdKeyDictionary()
_instances_lock = threading.Lock()


def instance_of(weight: torch.Tensor) -> Instance:
    """The sessions of the module that holds `weight`; they go when it goes."""
    found: Instance | None = _instances.get(weight)
    if found is None:
        with _instances_lock:
            found = _instances.get(weight)
            if found is None:
                found = _instances[weight] = Instance()
    return found


def instances_in(module: torch.nn.Module) -> list[Instance]:
    """The instances that hold a weight of `module`: one for each of its chains."""
    held = itertools.chain(module.parameters(), module.buffers())
    return [_instances[tensor] for tensor in held if tensor in _instances]


def is_cached(module: torch.nn.Module) -> bool:
    """Whether a graph of `module` was compiled with a guard in it."""
    return bool(instances_in(module))


def reset(module: torch.nn.Module | None = None) -> None:
    """Ends every session of `module`, or of all modules, and forgets their statistics. Compiled graphs stay."""
    for instance in list(_instances.values()) if module is None else instances_in(module):
        instance.clear()


def end_generation(module: torch.nn.Module, *, everyone: bool = False) -> None:
    """Ends the sessions of `module` that the asking request (or thread and async task) has, or all; statistics stay."""
    for instance in instances_in(module):
        instance.end(everyone=everyone)


def records_of(module: torch.nn.Module, *, every_generation: bool) -> list[Record]:
    """Sessions of `module` in the order of their first steps: those of its last generation, or all that are known."""
    found = [record for instance in instances_in(module) for record in instance.records()]
    last = max(found, key=lambda record: record.last, default=None)
    shown = [r for r in found if last is None or every_generation or _are_one_generation(r, last)]
    return sorted(shown, key=lambda record: record.first)


def _are_one_generation(one: Record, last: Record) -> bool:
    """Guidance branches of a generation take turns, so the times at which they ran overlap."""
    return one.key.who == last.key.who and one.last >= last.first
