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

from cachedit_fx.conditioning import ConditioningTable
from cachedit_fx.config import CacheConfig
from cachedit_fx.policy import Decision, History
from cachedit_fx.stats import CacheStats, Summary

MAX_SESSIONS = 64  # Per module; beyond it the one that was used least recently ends.
MAX_FINISHED = 64  # Sessions per module whose statistics are kept.

_request: ContextVar[Hashable | None] = ContextVar("cachedit_fx_request", default=None)
_serial = itertools.count(1)


@contextlib.contextmanager
def session(key: Hashable) -> Iterator[None]:
    """Names the request that the calls inside belong to, in this thread and async task.

    Steps of one request may come from several threads and between those of others; guidance branches inside it are
    told apart by their conditioning. Leaving the block ends nothing: a server may enter it anew for every step.

    Raises:
        TypeError: `key` is not hashable, or None.
    """
    if key is None:
        raise TypeError("cachedit_fx: session(key) takes any hashable key but None")
    hash(key)
    token = _request.set(key)
    try:
        yield
    finally:
        _request.reset(token)


@dataclass(frozen=True, slots=True)
class RegionState:
    """What one region keeps from its last computed step, and the record of its decisions.

    Attributes:
        residual: Over the Fn blocks, as the hidden stream.
        stored: One per value that leaves the region: what it added to its stream, or the value itself.
    """

    residual: torch.Tensor | None = None
    stored: tuple[torch.Tensor, ...] = ()
    history: History = field(default_factory=History)
    decisions: tuple[Decision, ...] = ()
    diffs: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> int:
        kept = self.stored if self.residual is None else (self.residual, *self.stored)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session between two steps. Replaced as a whole, so that a step that raises leaves nothing behind.

    Attributes:
        timestep: Of the last step; None before the first, or where the graph has no such input.
        direction: Sign in which the timestep moves; 0 while it has not.
    """

    timestep: float | None = None
    direction: int = 0
    regions: Mapping[str, RegionState] = field(default_factory=lambda: MappingProxyType({}))


class Session:
    """One generation's one guidance branch. `snapshot` is all that changes."""

    __slots__ = ("epoch", "key", "label", "number", "request", "snapshot")

    def __init__(self, key: tuple[Hashable, ...], label: str, request: Hashable | None, epoch: int) -> None:
        self.epoch = epoch
        self.key = key
        self.request = request
        self.label = label
        self.number = 0  # Set when its first step is done.
        self.snapshot = Snapshot()

    @property
    def is_named(self) -> bool:
        """Whether a `session(key)` names its request."""
        return self.request is not None

    def stats(self, *, finished: bool) -> list[CacheStats]:
        return [
            CacheStats(
                region=name,
                session=self.label,
                num_steps=len(state.decisions),
                cached_steps=[i for i, decision in enumerate(state.decisions) if not decision.compute],
                residual_diffs={i: d for i, d in enumerate(state.diffs) if state.decisions[i].looked},
                decisions=[decision.reason for decision in state.decisions],
                state_bytes=0 if finished else state.num_bytes,
                peak_state_bytes=state.num_bytes,
            )
            for name, state in self.snapshot.regions.items()
        ]


class Instance:
    """All sessions of one module instance."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._epoch = 0  # Counts the resets.
        self.conditioning = ConditioningTable(self._conditioning_ended, self._lock)
        self._sessions: OrderedDict[tuple[Hashable, ...], Session] = OrderedDict()
        self._finished: deque[tuple[int, list[CacheStats]]] = deque(maxlen=MAX_FINISHED)

    def open(self, config: CacheConfig, conditioning: torch.Tensor | None) -> Session:
        """The session that this call belongs to; a new one is not kept before `commit`."""
        token = self.conditioning.token(conditioning) if conditioning is not None else None
        request = _request.get()
        # Without a name, another thread or task is another request: one prompt object may serve two generations.
        who: Hashable = ("named", request) if request is not None else ("thread", *_running_in())
        key = (config, who, token)
        with self._lock:
            known = self._sessions.get(key)
        if known is not None:
            return known
        branch = "" if token is None else f"conditioning {token}"
        named = "" if request is None else str(request)
        return Session(key, ", ".join(filter(None, (named, branch))) or "unnamed", request, self._epoch)

    def commit(self, session: Session, snapshot: Snapshot, *, is_new_generation: bool) -> None:
        """Takes a finished step. A new generation under an old key ends the old session first."""
        with self._lock:
            if session.epoch != self._epoch:
                return  # Reset while the step ran: what it would keep was to go.
            if is_new_generation and session.number:
                self._finish(session)
                session = Session(session.key, session.label, session.request, session.epoch)
            session.number = session.number or next(_serial)
            session.snapshot = snapshot
            self._sessions[session.key] = session
            self._sessions.move_to_end(session.key)
            while len(self._sessions) > MAX_SESSIONS:
                self._finish(next(iter(self._sessions.values())))

    def summary(self) -> list[tuple[int, list[CacheStats]]]:
        with self._lock:
            running = [(session.number, session.stats(finished=False)) for session in self._sessions.values()]
            return [*self._finished, *running]

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            self._sessions.clear()
            self._finished.clear()
            self.conditioning.clear()

    def _finish(self, session: Session) -> None:
        self._finished.append((session.number, session.stats(finished=True)))
        self._sessions.pop(session.key, None)
        session.snapshot = Snapshot()

    def _conditioning_ended(self, token: int) -> None:
        with self._lock:
            for session in [s for s in self._sessions.values() if s.key[-1] == token]:
                self._finish(session)


def _running_in() -> tuple[Hashable, ...]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return (threading.get_ident(), id(task) if task is not None else None)


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


def _instances_in(module: torch.nn.Module) -> list[Instance]:
    held = itertools.chain(module.parameters(), module.buffers())
    return [_instances[tensor] for tensor in held if tensor in _instances]


def is_cached(module: torch.nn.Module) -> bool:
    """Whether a graph of `module` was compiled with a guard in it."""
    return bool(_instances_in(module))


def reset(module: torch.nn.Module | None = None) -> None:
    """Ends every session of `module`, or of all modules, and forgets their statistics. Compiled graphs stay."""
    for instance in list(_instances.values()) if module is None else _instances_in(module):
        instance.clear()


def summary(module: torch.nn.Module) -> Summary:
    """Statistics per session and region of `module`, finished or running, in the order of their first steps.

    A list of `CacheStats`; printed, it is a table.
    """
    found = [entry for instance in _instances_in(module) for entry in instance.summary()]
    return Summary(stats for _, group in sorted(found, key=lambda entry: entry[0]) for stats in group)
