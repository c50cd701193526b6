"""How much the sessions of a module may keep, and which of them go where it is too much."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cachedit_fx.runtime.guidance_branch import LOOP_START, GuidanceBranchKey, LoopPosition, SessionKey

if TYPE_CHECKING:
    from cachedit_fx.runtime.session import Session

log = logging.getLogger(__name__)

MAX_SESSIONS = 64  # Per module.
MAX_GUIDANCE_BRANCHES = 8  # Sessions that are taken for branches of one generation while it makes its first step.

# Why a session was dropped, and that one was not though it should have been (`CacheStats.bound`).
BYTES, NUMBER, OVER = "dropped-bytes", "dropped-number", "kept-over"


class Bounds:
    """What was dropped of one module, and what it came back as.

    Attributes:
        max_bytes: `CacheConfig.max_state_bytes` at the latest step.
        dropped: How many sessions, by the reason.
        over: Bytes that the generation of the latest step keeps, if these alone are more than `max_bytes`; else 0.
    """

    def __init__(self) -> None:
        self.max_bytes: int | None = None
        self.dropped: Counter[str] = Counter()
        self.over = 0
        self._gone: OrderedDict[SessionKey, tuple[float | None, int]] = OrderedDict()
        self._has_warned = False

    def too_much(
        self,
        sessions: Sequence[Session],
        loop_positions: Mapping[GuidanceBranchKey, LoopPosition],
        running: Session,
        max_bytes: int | None,
    ) -> list[tuple[Session, str]]:
        """The sessions that have to go, with the reason.

        Args:
            sessions: All of them, the one used least recently first.
            loop_positions: Where their branches stand.
            running: Has just made a step: its generation stays, however much that keeps.
        """
        self.max_bytes, self.over = max_bytes, 0
        going: dict[SessionKey, tuple[Session, str]] = {}
        total = sum(session.num_bytes for session in sessions)
        if max_bytes is not None and total > max_bytes:
            stays = generation_of(running, sessions, loop_positions)
            may_go = [session for session in sessions if session.key not in stays]
            while total > max_bytes and may_go:
                generation = [session for session in may_go if _overlap(session, may_go[0])]
                may_go = [session for session in may_go if session not in generation]
                going |= {session.key: (session, BYTES) for session in generation}
                total -= sum(session.num_bytes for session in generation)
            self.over = total if total > max_bytes else 0
        left = [session for session in sessions if session.key not in going]
        return [*going.values(), *((session, NUMBER) for session in left[: max(0, len(left) - MAX_SESSIONS)])]

    def drop(self, key: SessionKey, timestep: float | None, direction: int, why: str) -> None:
        """Takes note of a session that goes, and where it stood: it may come back."""
        self.dropped[why] += 1
        self._gone[key] = timestep, direction
        if len(self._gone) > MAX_SESSIONS:
            self._gone.popitem(last=False)

    def is_going_on(self, key: SessionKey, timestep: float | None, loop_position: LoopPosition) -> bool:
        """Whether a step goes on with a generation whose session was dropped; that is asked once.

        Args:
            timestep: Of the step.
            loop_position: Where the branch stands after it.
        """
        if key not in self._gone:
            return False
        before, direction = self._gone.pop(key)
        if loop_position.scheduler_run is not None or before is None or timestep is None:
            return True
        moved = timestep - before
        return moved != 0 and moved * direction >= 0

    def warn(self) -> None:
        """Says once that a generation lost what it had kept."""
        if self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "cachedit_fx: what a generation had kept was dropped before its end, so it computes anew.\n"
            "  expected: generations that take turns keep at most max_state_bytes=%s, in at most %d sessions\n"
            "  found:    more than that; the one that was used least recently was dropped, and went on afterwards\n"
            "What to do: raise max_state_bytes, or let fewer generations take turns.",
            self.max_bytes,
            MAX_SESSIONS,
        )

    @property
    def notes(self) -> list[str]:
        """What there is to say of it, a sentence each."""
        limits = {BYTES: f"max_state_bytes={self.max_bytes}", NUMBER: f"{MAX_SESSIONS} sessions"}
        found = [
            f"{count} session{'s were' if count > 1 else ' was'} dropped, the least recently used first, to keep no "
            f"more than {limits[why]}."
            for why, count in sorted(self.dropped.items())
        ]
        if self.over:
            found.append(
                f"The generation that ran last keeps {self.over} bytes, more than max_state_bytes={self.max_bytes}; "
                "one that runs is never dropped."
            )
        return found


def generation_of(
    running: Session, sessions: Sequence[Session], loop_positions: Mapping[GuidanceBranchKey, LoopPosition]
) -> set[SessionKey]:
    """The sessions that are branches of the generation of `running`, itself among them."""
    here, found = loop_positions.get(running.key.guidance_branch, LOOP_START), {running.key}
    beginning = 0
    for session in reversed(sessions):
        guidance_branch = session.key.guidance_branch
        there = loop_positions.get(guidance_branch, LOOP_START)
        if guidance_branch.who != running.key.guidance_branch.who:
            continue
        if here.scheduler_run is not None or there.scheduler_run is not None:
            is_same = there.goes_on_in(here.scheduler_run)
        else:
            is_same = guidance_branch == running.key.guidance_branch or _overlap(session, running)
            # At the first step of a generation its branches have not taken turns yet; they are at one timestep.
            has_place = here.timestep is not None or running.is_named
            if not is_same and has_place and here.timestep == there.timestep and beginning < MAX_GUIDANCE_BRANCHES:
                is_same, beginning = True, beginning + 1
        if is_same:
            found.add(session.key)
    return found


def _overlap(one: Session, other: Session) -> bool:
    """Whether the two took turns, as the branches of a generation do."""
    return (
        one.key.guidance_branch.who == other.key.guidance_branch.who
        and one.last >= other.first
        and other.last >= one.first
    )
