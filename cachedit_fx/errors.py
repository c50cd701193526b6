"""What a user can see go wrong."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from typing import Any

_WIDTH = 120


def shown(value: object) -> str:
    """What a message calls a value that was given: its repr on one line, cut where it is long."""
    first, *more = repr(value).splitlines() or [""]
    return f"{cut(first)} ..." if more else cut(first)


def cut(text: object, length: int = 88) -> str:
    """A text on one line, cut where it is long: what a compiler says of an error may be a file."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[:length]} ..."


def listed(names: Iterable[str]) -> str:
    """Many names, `a, b, c`, on as many lines as they need."""
    return textwrap.fill(", ".join(names), _WIDTH, break_long_words=False, break_on_hyphens=False)


__all__ = ["ConfigError", "NoMatchError", "PassError", "PatternError"]


class ConfigError(ValueError):
    """An option is unknown or has a value that it cannot have. Names the field, the value, what is allowed."""


class NoMatchError(RuntimeError):
    """`on_no_match="raise"` and the graph cannot be cached. The message is the one a fallback would have logged."""


class PassError(RuntimeError):
    """A pass raised, or left a graph that does not lint. Always a bug in cachedit_fx, never in the model."""


class PatternError(RuntimeError):
    """What a user declared of a model (`BlockAdapter`) is not what its graph shows, or a patch functor failed.

    Attributes:
        mismatch: The `Mismatch` of the declared pattern; None if the error does not concern a pattern.
        fits: A clause that says which other pattern fits, for example "blocks fits pattern 3 (hidden-only)".
    """

    def __init__(self, message: str, mismatch: Any = None, fits: str = "") -> None:
        super().__init__(message)
        self.mismatch, self.fits = mismatch, fits


def did_you_mean(value: object, allowed: Iterable[object]) -> str:
    """` Did you mean 'x'?` where `x` is close to what was given, else nothing."""
    near = difflib.get_close_matches(str(value), list(map(str, allowed)), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def missing(package: str, what: str) -> ConfigError:
    """What to say where a package of the extra `report` is not installed."""
    return ConfigError(f"cachedit_fx: {what} needs {package}, which is not installed: pip install cachedit_fx[report]")
