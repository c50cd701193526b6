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
_SENTENCES = {
    "psnr": "the fastest with a PSNR of at least {:g} dB",
    "rel_l2": "the fastest with a relative L2 distance of at most {:g}",
    "speedup": "the best quality at {:g} times the speed or more",
}
# The limits that a goal can have: the name of the argument, and what it limits.
_LIMITS = {"fastest": (("at_least", "psnr"), ("at_most", "rel_l2")), "best": (("at_least", "speedup"),)}
_EXAMPLES = {"fastest": "psnr=40", "best": "speedup=2"}
_NEEDS = {"fastest": "one limit on the quality", "best": "one limit on the speed"}
_CURE = (
    "What to do: pass target='fastest', at_least='psnr=40' (dB), or target='fastest', at_most='rel_l2=0.05' for the "
    "fastest\nconfiguration of this quality; or target='best', at_least='speedup=2' for the best quality at this speed."
)


@dataclass(frozen=True)
class Target:
    """A PSNR in dB or a speed-up to reach at least, or a relative L2 distance that must not be exceeded.

    For a quality, the fastest configuration is sought; for a speed-up, the one with the best quality.

    Attributes:
        kind: "psnr", "rel_l2" or "speedup".
        value: The value to reach.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def sentence(self) -> str:
        """The target in words, as the beginning of a sentence."""
        return _SENTENCES[self.kind].format(self.value)

    def shortfall(self, psnr: float, rel_l2: float) -> float:
        """Returns by how many dB a quality misses the target; 0 or less if it is reached.

        A target speed-up is never missed by quality.
        """
        if self.kind == "speedup":
            return -math.inf
        return self.value - psnr if self.kind == "psnr" else 20 * math.log10(max(rel_l2, 1e-12) / self.value)

    @classmethod
    def of(cls, given: Any, at_least: Any = None, at_most: Any = None) -> Target:
        """Returns the target that the arguments of `tune` describe.

        Args:
            given: "fastest" or "best", or the short form of both, such as `"psnr=35"` or `{"psnr": 35}`.
            at_least: The limit for "fastest", such as `"psnr=35"`, or for "best", such as `"speedup=2"`.
            at_most: The limit for "fastest", as `"rel_l2=0.05"`.

        Raises:
            ConfigError: A name is unknown, a value is not allowed, or the arguments do not fit together.
        """
        limits = {name: value for name, value in (("at_least", at_least), ("at_most", at_most)) if value is not None}
        if not isinstance(given, str) or given.strip() not in _LIMITS:
            if limits:
                raise ConfigError(
                    f"cachedit_fx: target must be 'fastest' or 'best' if {' or '.join(limits)} is given, got "
                    f"{shown(given)}; pass target='fastest', at_least='psnr=40', or target='psnr=40' alone"
                )
            return cls._checked(*_one(given, "target", _TARGETS, "psnr=35", "'fastest' or 'best' with at_least, or "))
        goal = given.strip()
        if len(limits) == 1:
            ((name, value),) = limits.items()
            kind, number = _one(value, name, _TARGETS, _EXAMPLES[goal])
            if (name, kind) in _LIMITS[goal]:
                return cls._checked(kind, number)
        found = ", ".join(f"{name}={shown(value)}" for name, value in limits.items()) or "neither at_least nor at_most"
        raise ConfigError(f"cachedit_fx: target {goal!r} needs {_NEEDS[goal]}, got {found}.\n{_CURE}")

    @classmethod
    def _checked(cls, kind: str, value: float) -> Target:
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
        whole: The budget that this one is a part of. What is spent of a part is spent of the whole.
    """

    kind: str
    value: float
    used: int = 0
    whole: Budget | None = None
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

    def part(self, share: float) -> Budget:
        """Returns a budget of a share of what is left; at least one run."""
        value = share * self.left
        return Budget(self.kind, max(1, math.ceil(value)) if self.kind == "runs" else max(value, 1e-9), whole=self)

    def spend(self, runs: int = 1) -> None:
        """Counts measured candidates."""
        self.used += runs
        if self.whole is not None:
            self.whole.spend(runs)

    @property
    def consumed(self) -> float:
        """The runs or seconds that were used."""
        return self.used if self.kind == "runs" else time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """The runs or seconds that are left; not below 0."""
        return max(0.0, self.value - self.consumed)

    @property
    def share_used(self) -> float:
        """The used share of the budget; more than 1 if the last run took longer than the rest of the budget."""
        return self.consumed / self.value

    @property
    def is_over(self) -> bool:
        return self.share_used >= 1


def _one(given: Any, what: str, allowed: tuple[str, ...], example: str, before: str = "") -> tuple[str, float]:
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
            f"cachedit_fx: {what} must be {before}one of {', '.join(allowed)} with a number, such as {example!r} or "
            f"{{{example.partition('=')[0]!r}: {example.partition('=')[2]}}}, got {shown(given)}"
        )
    return name, value
