"""What exists between two calls of a module: its sessions, and where its guidance branches are in their loops."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

import torch

from cachedit_fx.forking import released_in_child
from cachedit_fx.runtime.bounds import MAX_SESSIONS, OVER, Bounds
from cachedit_fx.runtime.call_counts import CallTally
from cachedit_fx.runtime.conditioning import ConditioningTable
from cachedit_fx.runtime.guidance import Report, Unguided, find_reference
from cachedit_fx.runtime.guidance_branch import (
    LOOP_START,
    GuidanceBranchKey,
    LoopPosition,
    SessionKey,
    current_label,
    is_identified_by_name,
)
from cachedit_fx.runtime.host_read import Timestep
from cachedit_fx.runtime.request import current_owner, current_request
from cachedit_fx.runtime.scheduler_run import SchedulerRun, find_scheduler_run
from cachedit_fx.runtime.session import Record, Session
from cachedit_fx.runtime.snapshot import Snapshot

MAX_FINISHED = 64  # The number of finished sessions per module whose statistics are kept.

_step_numbers = itertools.count(1)  # Numbers the steps of all sessions.


class Instance:
    """All sessions of one module instance.

    Args:
        module: The module, if it is known.

    Attributes:
        bounds: The bounds on the sessions, and what was dropped to keep them.
        weights_version: The number of detected changes of modules or weights.
        has_cached_graph: Whether the module has a cached graph. If the cache is enabled, whether the last call ran one.
        is_enabled: Whether `enable_cache` was called for the module, and not `disable_cache` since.
        keeps_sessions: Whether steps are committed. Without, every step computes.
        shares_decisions: Whether a cached graph of the module decides together with other ranks.
        calls: How the calls of an enabled module were served.
        reported: The kinds of reasons for running without the cache that were reported to the user.
        unguided: Why steps did not follow another guidance branch (`guidance_reuse`).
    """

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        self._lock = released_in_child(threading.RLock())
        self._epoch = 0  # The number of times that all sessions were ended.
        self._module = weakref.ref(module) if module is not None else None
        self.conditioning = ConditioningTable(self._conditioning_ended, self._lock, self._is_held_by_module_only)
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()  # The most recently used last.
        self._loop_positions: dict[GuidanceBranchKey, LoopPosition] = {}  # Of branches with and without sessions.
        self._finished: deque[Record] = deque(maxlen=MAX_FINISHED)
        self.bounds = Bounds()
        self.weights_version = 0
        self.has_cached_graph = self.is_enabled = False
        self.keeps_sessions, self.shares_decisions = True, False
        self.calls = CallTally()
        self.reported: set[str] = set()
        self.unguided = Report()

    def open(
        self, owner: Hashable, conditioning: torch.Tensor | None, scheduler_run: SchedulerRun | None = None
    ) -> tuple[Session, LoopPosition]:
        """The expected session of a call, and the loop position of its branch. Changes nothing before `commit`.

        The ordinal of the call is only certain when its timestep is known (see `at`).
        """
        token = self._token(conditioning)
        request = current_request()
        key = GuidanceBranchKey(owner, current_owner(request), current_label(), token)
        with self._lock:
            loop_position = self._loop_positions.get(key) or self._loop_positions.get(
                key._replace(owner=None), LOOP_START
            )
            predicted = SessionKey(key, loop_position.predicted_ordinal(scheduler_run))
            known = self._sessions.get(predicted)
        return known or Session(predicted, request, self._epoch), loop_position

    def at(self, session: Session, ordinal: int) -> Session:
        """The session for another ordinal of the guidance branch of `session`."""
        key = SessionKey(session.key.guidance_branch, ordinal)
        with self._lock:
            known = self._sessions.get(key)
        return known or Session(key, session.request, session.epoch)

    def record_uncached(self, conditioning: torch.Tensor | None, timestep: Timestep) -> None:
        """Counts a call that no cached graph served in the loop position, which gives the next call its ordinal."""
        token = self._token(conditioning)
        scheduler_run = find_scheduler_run()
        mine = GuidanceBranchKey(None, current_owner(current_request()), current_label(), token)
        with self._lock:
            for key in [mine, *(key for key in self._loop_positions if key._replace(owner=None) == mine)]:
                loop_position = self._loop_positions.get(key, LOOP_START)
                ordinal = loop_position.ordinal_at(timestep, scheduler_run)
                self._loop_positions.pop(key, None)
                self._loop_positions[key] = loop_position.after(
                    ordinal, timestep, scheduler_run, is_first=loop_position is LOOP_START
                )
            self._bound_loop_positions()

    def _token(self, conditioning: torch.Tensor | None) -> int | None:
        return None if conditioning is None or is_identified_by_name() else self.conditioning.token(conditioning)

    def undo_open(self, session: Session) -> None:
        """Undoes `open` for a call that is discarded and will be made again."""
        token = session.key.guidance_branch.token
        if token is not None:
            self.conditioning.uncount(token)

    def partner(self, session: Session) -> Session | None:
        """The session of the other guidance branch of the same request that made the last step."""
        mine, ordinal = session.key.guidance_branch, session.key.ordinal

        def is_partner(key: SessionKey) -> bool:
            other = key.guidance_branch
            same = (other.owner, other.who, key.ordinal) == (mine.owner, mine.who, ordinal)
            return same and other != mine

        with self._lock:
            return next((s for key, s in reversed(self._sessions.items()) if is_partner(key)), None)

    def reference(
        self, session: Session, scheduler_run: SchedulerRun | None, timestep: float | None
    ) -> Session | Unguided | None:
        """The session of the guidance branch that was called first at this step (see `find_reference`)."""
        with self._lock:
            return find_reference(session, self._sessions.values(), self._loop_positions, scheduler_run, timestep)

    def commit(
        self,
        session: Session,
        snapshot: Snapshot,
        loop_position: LoopPosition,
        *,
        is_new_generation: bool,
        max_bytes: int | None = None,
    ) -> None:
        """Makes a finished step part of its session. A new generation ends the old session of its key first.

        Args:
            loop_position: The loop position of the branch after the step.
            max_bytes: The bound on the cached values of all sessions; None for no bound.
        """
        with self._lock:
            if session.epoch != self._epoch or not self.keeps_sessions:
                return  # All sessions were ended while the step ran.
            if is_new_generation:
                self._end_generation_of(session)
                session = Session(session.key, session.request, session.epoch)
            continues_dropped = (
                self.bounds.continues_dropped(session.key, snapshot, loop_position) and not is_new_generation
            )
            if continues_dropped and not session.first:
                self.bounds.warn()
                snapshot = snapshot._replace(began="state-dropped")
            self._loop_positions[session.key.guidance_branch] = loop_position
            session.last = next(_step_numbers)
            session.first = session.first or session.last
            session.snapshot = snapshot
            session.num_bytes = sum(region.num_bytes for region in snapshot.regions.values())
            self._sessions[session.key] = session
            self._sessions.move_to_end(session.key)
            sessions = [*self._sessions.values()]
            for old, why in self.bounds.sessions_to_drop(sessions, self._loop_positions, session, max_bytes):
                self._drop(old, why)
            session.bound = OVER if self.bounds.over else ""

    def records(self) -> list[Record]:
        """The records of all running sessions, and of the sessions that finished last."""
        with self._lock:
            return [*self._finished, *(self._record(session, finished=False) for session in self._sessions.values())]

    def end(self, *, everyone: bool) -> None:
        """Ends the sessions of the current request (or the thread and async task), or all sessions.

        A pipeline ends only its own sessions, since another one further up the stack may be in the middle of its loop.
        """
        scheduler_run, who = find_scheduler_run(), current_owner(current_request())

        def is_ended(guidance_branch: GuidanceBranchKey) -> bool:
            loop_position = self._loop_positions.get(guidance_branch, LOOP_START)
            is_other = (
                scheduler_run is not None
                and loop_position.scheduler_run is not None
                and not loop_position.continues_in(scheduler_run)
            )
            return guidance_branch.who == who and not is_other

        with self._lock:
            self._epoch += everyone  # Running steps will not be committed.
            for session in [s for s in self._sessions.values() if everyone or is_ended(s.key.guidance_branch)]:
                self._finish(session)
            self._remove_loop_positions(lambda guidance_branch: everyone or is_ended(guidance_branch))

    def clear(self) -> None:
        with self._lock:
            self._epoch += 1
            self._sessions.clear()
            self._loop_positions.clear()
            self._finished.clear()
            self.bounds, self.unguided = Bounds(), Report()
            self.conditioning.clear()
        self.calls.clear()

    def _end_generation_of(self, session: Session) -> None:
        """Ends the old session of the same key; if its ordinal is 0, also the sessions of the other ordinals."""
        guidance_branch, ordinal = session.key.guidance_branch, session.key.ordinal
        ended = [
            s
            for k, s in self._sessions.items()
            if k.guidance_branch == guidance_branch and (k.ordinal == ordinal or not ordinal)
        ]
        for old in ended:
            self._finish(old)

    def _drop(self, session: Session, why: str) -> None:
        """Drops a session whose generation may continue. Its branch keeps its loop position, which may be in a step."""
        guidance_branch, loop_position = session.key.guidance_branch, self._loop_positions[session.key.guidance_branch]
        session.bound, snapshot = why, session.snapshot
        self._finish(session)
        self.bounds.drop(session.key, snapshot, why)
        self._loop_positions.pop(guidance_branch, None)
        self._loop_positions[guidance_branch] = loop_position
        self._bound_loop_positions()

    def _bound_loop_positions(self) -> None:
        """Removes the least recently used loop positions of branches without sessions."""
        have_sessions = {key.guidance_branch for key in self._sessions}
        for guidance_branch in [b for b in self._loop_positions if b not in have_sessions][:-MAX_SESSIONS]:
            del self._loop_positions[guidance_branch]

    def _finish(self, session: Session) -> None:
        self._finished.append(self._record(session, finished=True))
        self._sessions.pop(session.key, None)
        self._remove_loop_positions(lambda guidance_branch: guidance_branch == session.key.guidance_branch)
        session.snapshot, session.num_bytes = Snapshot(), 0

    def _remove_loop_positions(self, is_removed: Callable[[GuidanceBranchKey], bool]) -> None:
        """Removes the loop positions of these branches, unless they have sessions."""
        have_sessions = {key.guidance_branch for key in self._sessions}
        for guidance_branch in [b for b in self._loop_positions if is_removed(b) and b not in have_sessions]:
            del self._loop_positions[guidance_branch]

    def _record(self, session: Session, *, finished: bool) -> Record:
        num_dropped = self.bounds.dropped.total()
        return Record(
            session.key, session.first, session.last, session.stats(finished=finished, num_dropped=num_dropped)
        )

    def _is_held_by_module_only(self, tensor: torch.Tensor, references: int) -> bool:
        """Whether all references to `tensor` are attributes of the module, which may store its context on itself."""
        module = self._module() if self._module is not None else None
        if module is None:
            return False
        return 0 < references == sum(value is tensor for inner in module.modules() for value in vars(inner).values())

    def _conditioning_ended(self, token: int) -> None:
        with self._lock:
            for session in [s for s in self._sessions.values() if s.key.guidance_branch.token == token]:
                self._finish(session)
            self._remove_loop_positions(lambda guidance_branch: guidance_branch.token == token)
