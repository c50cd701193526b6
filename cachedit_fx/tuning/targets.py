"""The target of a search and its budget: `Target`, `Budget`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachedit_fx.errors import ConfigError, shown

_TARGETS = ("psnr", "rel_l2", "speedup")
_BUDGETS = ("runs", "seconds")


@dataclass(frozen=True)
class Target:
    """A PSNR in dB or a speed-up to reach at least, or a relative L2 distance that must not be exceeded.

    Attributes:
        kind: "psnr", "rel_l2" or "speedup".
        value: The value to reach.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @classmethod
    def of(cls, given: Any) -> Target:
        """Parses `{"psnr": 35}` or `"psnr=35"`.

        Raises:
            ConfigError: The name is unknown, or the value is not allowed.
        """
        kind, value = _one(given, "target", _TARGETS, "psnr=35")
        if value <= 0 or (kind == "speedup" and value <= 1):
            least = 1 if kind == "speedup" else 0
            raise ConfigError(f"cachedit_fx: target {kind} must be greater than {least}, got {value:g}")
        return cls(kind, value)


@dataclass
class Budget:
    """The limit on measurements: a number of candidates, or a number of seconds from now on.

    Attributes:
        kind: "runs" or "seconds".
        value: The number of runs or seconds.
        used: The number of candidates that were measured.
    """

    kind: str
    value: float
    used: int = 0
    _start: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, given: Any) -> Budget:
        """Parses `{"runs": 24}`, `"seconds=300"`, or a number of seconds.

        Raises:
            ConfigError: The name is unknown, or the value is not allowed.
        """
        if isinstance(given, int | float) and not isinstance(given, bool):
            given = {"seconds": given}
        kind, value = _one(given, "budget", _BUDGETS, "runs=24")
        if value <= 0:
            raise ConfigError(f"cachedit_fx: budget {kind} must be greater than 0, got {value:g}")
        return cls(kind, value)

    @property
    def share_used(self) -> float:
        """The used share of the budget; more than 1 if the last run took longer than the rest of the budget."""
        used = self.used if self.kind == "runs" else time.perf_counter() - self._start
        return used / self.value

    @property
    def is_over(self) -> bool:
        return self.share_used >= 1


def _one(given: Any, what: str, allowed: tuple[str, ...], example: str) -> tuple[str, float]:
    name, value = "", math.nan
    if isinstance(given, str):
        name, _, text = given.partition("=")
        given = {name.strip(): text}
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, found),) = given.items()
        try:
            value = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            value = math.nan
    if name not in allowed or not math.isfinite(value):
        raise ConfigError(
            f"cachedit_fx: {what} must be one of {', '.join(allowed)} with a number, such as {example!r} or "
            f"{{{example.partition('=')[0]!r}: {example.partition('=')[2]}}}, got {shown(given)}"
        )
    return name, value
