"""The exceptions that this package raises, and helpers that format their messages."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from typing import Any

_WIDTH = 120


def shown(value: object) -> str:
    """Returns the `repr` of a value on one line for a message, shortened if it is long."""
    first, *more = repr(value).splitlines() or [""]
    return f"{cut(first)} ..." if more else cut(first)


def cut(text: object, length: int = 88) -> str:
    """Returns a text on one line, shortened to `length` characters; a compiler's message may be as long as a file."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[:length]} ..."


def listed(names: Iterable[str]) -> str:
    """Returns the names as `a, b, c`, wrapped to lines of at most 120 characters."""
    return textwrap.fill(", ".join(names), _WIDTH, break_long_words=False, break_on_hyphens=False)


__all__ = ["ConfigError", "NoMatchError", "PassError", "PatternError"]


class ConfigError(ValueError):
    """An option is unknown, or its value is not allowed.

    The message names the field, the value and the values that are allowed.
    """


class NoMatchError(RuntimeError):
    """The graph cannot be cached, and the configuration has `on_no_match="raise"`.

    The message is the one that is logged as a warning with `on_no_match="fallback"`.
    """


class PassError(RuntimeError):
    """A pass raised an exception, or its graph does not lint. This is a bug in cachedit_fx, never in the model."""


class PatternError(RuntimeError):
    """The graph of a model contradicts what the user declared (`BlockAdapter`), or a patch functor failed.

    Attributes:
        mismatch: The `Mismatch` of the declared pattern; None if the error does not concern a pattern.
        fits: A clause that says which other pattern fits, for example "blocks fits pattern 3 (hidden-only)".
    """

    def __init__(self, message: str, mismatch: Any = None, fits: str = "") -> None:
        super().__init__(message)
        self.mismatch, self.fits = mismatch, fits


def did_you_mean(value: object, allowed: Iterable[object]) -> str:
    """Returns ` Did you mean 'x'?` if an allowed value `x` is similar to `value`, else an empty string."""
    near = difflib.get_close_matches(str(value), list(map(str, allowed)), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def missing(package: str, what: str) -> ConfigError:
    """Returns the error for a package of the extra `report` that is not installed."""
    return ConfigError(f"cachedit_fx: {what} needs {package}, which is not installed: pip install cachedit_fx[report]")
