"""How often a module was called since the cache was enabled for it, and how its calls were served."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachedit_fx.forking import released_in_child

MAX_REASONS = 16  # Per module. Calls with further reasons are counted with the last one.


@dataclass(frozen=True, slots=True)
class CallCounts:
    """Calls of one module that returned, since `enable_cache` or `reset`.

    Attributes:
        computed: Calls that ran all blocks with the cache.
        reused: Calls that reused cached values in at least one region.
        uncached: Calls that ran without the cache.
        bypassed: Calls of another method of the module that runs its blocks, which bypass the cache.
        reasons: Why calls were uncached or bypassed the cache, as sentences, with the number of these calls.
    """

    computed: int = 0
    reused: int = 0
    uncached: int = 0
    bypassed: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of all calls."""
        return self.computed + self.reused + self.uncached + self.bypassed

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
        return dataclasses.asdict(dataclasses.replace(self, reasons=dict(self.reasons)))

    def __str__(self) -> str:
        """One line, and one more for every reason."""
        if not self.total:
            return (
                "no call has been seen since the cache was enabled. Only calls of the model itself are seen, or of the "
                "method given as enable_cache(model, method=...); model.forward(...) and other methods run without "
                "the cache"
            )
        names = ("computed", "reused", "uncached", "bypassed")
        parts = [f"{getattr(self, name)} {name}" for name in names if getattr(self, name) or name in names[:2]]
        calls = f"{self.total} call{'s' * (self.total != 1)} since the cache was enabled"
        why = (f"\n  {count} without the cache: {reason}" for reason, count in self.reasons.items())
        return f"{calls}: {', '.join(parts)}{''.join(why)}"


class CallTally:
    """Counts the calls of one module, from several threads."""

    def __init__(self) -> None:
        self._lock = released_in_child(threading.Lock())
        self.clear()

    def clear(self) -> None:
        """Sets all counts to zero."""
        with self._lock:
            self._computed = self._reused = self._uncached = self._bypassed = 0
            self._reasons: dict[str, int] = {}

    def count_served(self, *, is_reused: bool) -> None:
        """Counts a call that the cache served."""
        with self._lock:
            if is_reused:
                self._reused += 1
            else:
                self._computed += 1

    def count_not_served(self, reason: str, *, reached_cache: bool = True) -> None:
        """Counts a call that the cache did not serve.

        Args:
            reason: Why, in a sentence.
            reached_cache: Whether it was a call of the module itself, rather than of another method.
        """
        with self._lock:
            self._uncached += reached_cache
            self._bypassed += not reached_cache
            if reason not in self._reasons and len(self._reasons) >= MAX_REASONS:
                reason = next(reversed(self._reasons))
            self._reasons[reason] = self._reasons.get(reason, 0) + 1

    @property
    def counts(self) -> CallCounts:
        with self._lock:
            counted = self._computed, self._reused, self._uncached, self._bypassed
            return CallCounts(*counted, dict(self._reasons))
