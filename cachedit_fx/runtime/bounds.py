"""The bounds on the memory and the number of sessions of a module, and which sessions are dropped to keep them."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

from cachedit_fx.runtime.guidance_branch import LOOP_START, GuidanceBranchKey, LoopPosition, SessionKey
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.snapshot import Snapshot, direction_of

log = logging.getLogger(__name__)

MAX_SESSIONS = 64  # Per module.
MAX_GUIDANCE_BRANCHES = 8  # Sessions that are regarded as branches of one generation during its first step.

# Values of `CacheStats.bound`: why a session was dropped; and that it was not dropped, because it was running.
BYTES, NUMBER, OVER = "dropped-bytes", "dropped-number", "kept-over"


class Bounds:
    """The bounds on the sessions of one module, and a record of the sessions that were dropped.

    Attributes:
        max_bytes: `CacheConfig.max_state_bytes` at the last step.
        dropped: The number of sessions that were dropped, by reason.
        over: The bytes that the generation of the last step caches, if these alone exceed `max_bytes`; else 0.
    """

    def __init__(self) -> None:
        self.max_bytes: int | None = None
        self.dropped: Counter[str] = Counter()
        self.over = 0
        self._dropped_sessions: OrderedDict[SessionKey, tuple[float | None, int]] = OrderedDict()
        self._has_warned = False

    def sessions_to_drop(
        self,
        sessions: Sequence[Session],
        loop_positions: Mapping[GuidanceBranchKey, LoopPosition],
        running: Session,
        max_bytes: int | None,
    ) -> list[tuple[Session, str]]:
        """The sessions that have to be dropped, with the reason.

        Args:
            sessions: All sessions, the least recently used first.
            loop_positions: The loop positions of their guidance branches.
            running: The session that has just made a step. Its generation is not dropped, however large it is.
        """
        self.max_bytes, self.over = max_bytes, 0
        dropped: dict[SessionKey, tuple[Session, str]] = {}
        total = sum(session.num_bytes for session in sessions)
        if max_bytes is not None and total > max_bytes:
            kept = generation_of(running, sessions, loop_positions)
            candidates = [session for session in sessions if session.key not in kept]
            while total > max_bytes and candidates:
                generation = [session for session in candidates if _overlap(session, candidates[0])]
                candidates = [session for session in candidates if session not in generation]
                dropped |= {session.key: (session, BYTES) for session in generation}
                total -= sum(session.num_bytes for session in generation)
            self.over = total if total > max_bytes else 0
        left = [session for session in sessions if session.key not in dropped]
        return [*dropped.values(), *((session, NUMBER) for session in left[: max(0, len(left) - MAX_SESSIONS)])]

    def drop(self, key: SessionKey, snapshot: Snapshot, why: str) -> None:
        """Records that a session is dropped, with its last timestep, since its generation may continue."""
        self.dropped[why] += 1
        self._dropped_sessions[key] = snapshot.timestep, direction_of(snapshot)
        if len(self._dropped_sessions) > MAX_SESSIONS:
            self._dropped_sessions.popitem(last=False)

    def continues_dropped(self, key: SessionKey, snapshot: Snapshot, loop_position: LoopPosition) -> bool:
        """Whether a step continues a generation whose session was dropped. The record of the session is removed.

        Args:
            snapshot: The state after the step.
            loop_position: The loop position of the guidance branch after the step.
        """
        if key not in self._dropped_sessions:
            return False
        before, direction = self._dropped_sessions.pop(key)
        if loop_position.scheduler_run is not None or before is None:
            return True
        timestep = snapshot.timestep
        if timestep is None:
            return True
        moved = timestep - before
        return moved != 0 and moved * direction >= 0

    def warn(self) -> None:
        """Warns once that a generation lost its cached values."""
        if self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "cachedit_fx: the cached values of a generation were dropped before its end, so it has to compute again.\n"
            "  expected: interleaved generations cache at most max_state_bytes=%s, in at most %d sessions\n"
            "  found:    more than that: the least recently used generation was dropped, and continued afterwards\n"
            "What to do: raise max_state_bytes, or interleave fewer generations.",
            self.max_bytes,
            MAX_SESSIONS,
        )

    @property
    def notes(self) -> list[str]:
        """What was dropped and what exceeds the bound, one sentence each."""
        limits = {BYTES: f"max_state_bytes={self.max_bytes}", NUMBER: f"{MAX_SESSIONS} sessions"}
        found = [
            f"{count} session{'s were' if count > 1 else ' was'} dropped, the least recently used first, to keep no "
            f"more than {limits[why]}."
            for why, count in sorted(self.dropped.items())
        ]
        if self.over:
            found.append(
                f"The generation that ran last caches {self.over} bytes, more than max_state_bytes={self.max_bytes}; "
                "a running generation is never dropped."
            )
        return found


def generation_of(
    running: Session, sessions: Sequence[Session], loop_positions: Mapping[GuidanceBranchKey, LoopPosition]
) -> set[SessionKey]:
    """The sessions that are guidance branches of the generation of `running`, including `running`."""
    here, found = loop_positions.get(running.key.guidance_branch, LOOP_START), {running.key}
    num_starting = 0
    for session in reversed(sessions):
        guidance_branch = session.key.guidance_branch
        there = loop_positions.get(guidance_branch, LOOP_START)
        if guidance_branch.who != running.key.guidance_branch.who:
            continue
        if here.scheduler_run is not None or there.scheduler_run is not None:
            is_same = there.continues_in(here.scheduler_run)
        else:
            is_same = guidance_branch == running.key.guidance_branch or _overlap(session, running)
            # During the first step of a generation, its branches have not alternated yet, but have the same timestep.
            has_time = here.timestep is not None or running.is_named
            if not is_same and has_time and here.timestep == there.timestep and num_starting < MAX_GUIDANCE_BRANCHES:
                is_same, num_starting = True, num_starting + 1
        if is_same:
            found.add(session.key)
    return found


def _overlap(one: Session, other: Session) -> bool:
    """Whether the two sessions alternated, as the guidance branches of a generation do."""
    return (
        one.key.guidance_branch.who == other.key.guidance_branch.who
        and one.last >= other.first
        and other.last >= one.first
    )
