"""What exists between two calls: sessions, the cache state of one generation's one guidance branch."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cachedit_fx.branch import FIRST_TURN, BranchKey, SessionKey, Turn
from cachedit_fx.caller import Schedule, find_schedule
from cachedit_fx.calls import CallTally
from cachedit_fx.clock import Lap, Laps
from cachedit_fx.conditioning import ConditioningTable
from cachedit_fx.config import Changes
from cachedit_fx.kept import Kept, NotForecast, Reused, Unread
from cachedit_fx.policies import Decision, History
from cachedit_fx.request import current_owner, current_request
from cachedit_fx.stats import CacheStats, StepError

MAX_SESSIONS = 64  # Per module; beyond it the one that was used least recently ends.
MAX_FINISHED = 64  # Sessions per module whose statistics are kept.

_label: ContextVar[str | None] = ContextVar("cachedit_fx_label", default=None)
_call: ContextVar[ModelCall | None] = ContextVar("cachedit_fx_call", default=None)
_clock = itertools.count(1)  # Numbers the steps of all sessions.


class ModelCall:
    """What a call of the whole model was given: for graphs that begin behind the model's first lines.

    Attributes:
        conditioning: The tensor whose identity tells requests and guidance branches apart.
        policy: When to reuse, whatever the graphs were compiled with; None for that.
        ran: Guarded graphs that Dynamo ran during this call, each with its arguments and outputs.
        misses: Graphs that ran without the cache during this call (`UncachedGraph`), each as often as it ran.
        num_served: Guarded graphs that ran during this call, whoever ran them.
        has_reused: Whether one of these reused what was kept.
        instance: The sessions of the model; None where its weights tell.
    """

    __slots__ = ("_timestep", "conditioning", "has_reused", "instance", "misses", "num_served", "policy", "ran")

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
        self.misses: list[Any] = []
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
        graph: Number of the guarded graph that made the last computed step.
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
    laps: tuple[Lap, ...] = ()
    regions: Mapping[str, RegionState] = field(default_factory=lambda: MappingProxyType({}))


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
        key = self.key.branch
        branch = key.label or ("" if key.token is None else f"conditioning {key.token}")
        named = "" if self.request is None else str(self.request)
        further = f"call {self.key.ordinal + 1} of a step" if self.key.ordinal else ""
        return ", ".join(filter(None, (named, branch, further))) or "unnamed"

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
    """All sessions of one module instance.

    Args:
        module: The module, where it is known.

    Attributes:
        weights: Counts the times that modules or weights of the module were seen to be others.
        is_guarded: Whether a graph of the module has a guard; where the cache is enabled, whether the last call ran
            such a graph.
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
        self._turns: dict[BranchKey, Turn] = {}  # Of the branches that have sessions.
        self._finished: deque[Record] = deque(maxlen=MAX_FINISHED)
        self.weights = 0
        self.is_guarded = self.is_enabled = False
        self.calls = CallTally()
        self.told: set[str] = set()

    def open(
        self, owner: Hashable, conditioning: torch.Tensor | None, schedule: Schedule | None = None
    ) -> tuple[Session, Turn]:
        """The session that this call seems to belong to, and where its branch stands; nothing changes before `commit`.

        Which of a step's calls it is, is known for certain once its timestep is: see `at`.
        """
        token = self.conditioning.token(conditioning) if conditioning is not None else None
        request = current_request()
        key = BranchKey(owner, current_owner(request), _label.get(), token)
        with self._lock:
            turn = self._turns.get(key, FIRST_TURN)
            known = self._sessions.get(SessionKey(key, turn.foreseen(schedule)))
        return known or Session(SessionKey(key, turn.foreseen(schedule)), request, self._epoch), turn

    def at(self, session: Session, ordinal: int) -> Session:
        """The session of another of the calls that the branch of `session` makes at a step."""
        key = SessionKey(session.key.branch, ordinal)
        with self._lock:
            known = self._sessions.get(key)
        return known or Session(key, session.request, session.epoch)

    def take_back(self, session: Session) -> None:
        """Undoes `open` for a call that was given up and will be made anew: its prompt has not served it."""
        token = session.key.branch.token
        if token is not None:
            self.conditioning.take_back(token)

    def partner(self, session: Session) -> Session | None:
        """The session of another guidance branch of the same request that made the last step before this."""
        mine, ordinal = session.key.branch, session.key.ordinal

        def is_partner(key: SessionKey) -> bool:
            other = key.branch
            same = (other.owner, other.who, key.ordinal) == (mine.owner, mine.who, ordinal)
            return same and other != mine

        with self._lock:
            return next((s for key, s in reversed(self._sessions.items()) if is_partner(key)), None)

    def commit(self, session: Session, snapshot: Snapshot, turn: Turn, *, is_new_generation: bool) -> None:
        """Takes a finished step. A new generation under an old key ends the old session first.

        Args:
            turn: Where the branch stands now.
        """
        with self._lock:
            if session.epoch != self._epoch:
                return  # Reset while the step ran: what it would keep was to go.
            if is_new_generation:
                self._end_generation_of(session)
                session = Session(session.key, session.request, session.epoch)
            self._turns[session.key.branch] = turn
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
        """Ends the sessions of the request (or the thread and async task) that asks, or all.

        A pipeline ends its own: another one may be in the middle of its loop, further up the stack.
        """
        schedule, who = find_schedule(), current_owner(current_request())

        def is_asked(branch: BranchKey) -> bool:
            turn = self._turns.get(branch, FIRST_TURN)
            is_other = schedule is not None and turn.schedule is not None and not turn.goes_on_in(schedule)
            return branch.who == who and not is_other

        with self._lock:
            self._epoch += everyone  # So that steps that are running now leave nothing behind.
            for session in [s for s in self._sessions.values() if everyone or is_asked(s.key.branch)]:
                self._finish(session)

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            self._sessions.clear()
            self._turns.clear()
            self._finished.clear()
            self.conditioning.clear()
        self.calls.clear()

    def _end_generation_of(self, session: Session) -> None:
        """Ends what the session did before, and with the first of a step's calls what the further ones did."""
        branch, ordinal = session.key.branch, session.key.ordinal
        ended = [s for k, s in self._sessions.items() if k.branch == branch and (k.ordinal == ordinal or not ordinal)]
        for old in ended:
            self._finish(old)

    def _finish(self, session: Session) -> None:
        self._finished.append(self._record(session, finished=True))
        self._sessions.pop(session.key, None)
        branch = session.key.branch
        if not any(key.branch == branch for key in self._sessions):
            self._turns.pop(branch, None)
        session.snapshot = Snapshot()

    @staticmethod
    def _record(session: Session, *, finished: bool) -> Record:
        return Record(session.key, session.first, session.last, session.stats(finished=finished))

    def _is_let_go(self, tensor: torch.Tensor, references: int) -> bool:
        """Whether all references to `tensor` are the module's own, as where a model stores its context on itself."""
        module = self._module() if self._module is not None else None
        if module is None:
            return False
        return 0 < references == sum(value is tensor for inner in module.modules() for value in vars(inner).values())

    def _conditioning_ended(self, token: int) -> None:
        with self._lock:
            for session in [s for s in self._sessions.values() if s.key.branch.token == token]:
                self._finish(session)
