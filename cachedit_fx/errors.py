"""The exceptions that this package raises, and helpers that format their messages."""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_WIDTH = 120
_LEAST_SHARED = 0.3  # Of the words that two names share: a word of three names, or several more common ones.


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


def nearest_by_words(given: str, names: Iterable[str]) -> list[str]:
    """Returns the name that shares the most words with `given`, in a list that is empty if too few are shared.

    A word counts more if fewer of the names have it: `threshold` says more than `steps`.
    """
    known = {name: _words(name) for name in names}
    counts = Counter(word for words in known.values() for word in words)
    wanted = _words(given)
    shared = {name: sum(1 / counts[word] for word in words if word in wanted) for name, words in known.items()}
    best = max(known, key=lambda name: (shared[name], -len(known[name])), default="")
    is_near = bool(best) and len(known[best] & wanted) * 2 >= len(wanted) and shared[best] > _LEAST_SHARED
    return [best] if is_near else []


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _words(name: str) -> frozenset[str]:
    """The words of a name, in the singular: {"max", "warmup", "step"} of `max_warmup_steps`."""
    return frozenset(word if len(word) < 4 else word.removesuffix("s") for word in _plain(name).split("_") if word)


def did_you_mean(
    value: object, allowed: Iterable[object], synonyms: Mapping[str, str] | None = None, words_of: Iterable[str] = ()
) -> str:
    """Returns ` Did you mean 'x'?` if an allowed value `x` is similar to `value`, else an empty string.

    Args:
        synonyms: Other name -> the allowed name to suggest, or an assignment to it (`name=...`) that is shown as it is.
        words_of: The allowed names that may be suggested for sharing words with `value`, not only letters.
    """
    given, names = str(value), list(map(str, allowed))
    meant = {_plain(name): ours for name, ours in (synonyms or {}).items()}.get(_plain(given), "")
    if meant.partition("=")[0] in names:
        return f" Did you mean {meant if '=' in meant else repr(meant)}?"
    near = (
        *difflib.get_close_matches(given, names, n=1, cutoff=0.85),
        *nearest_by_words(given, words_of),
        *difflib.get_close_matches(given, names, n=1),
    )
    return f" Did you mean {near[0]!r}?" if near else ""


def missing(package: str, what: str, extra: str = "report") -> ConfigError:
    """Returns the error for a package of an extra of cachedit_fx that is not installed."""
    return ConfigError(f"cachedit_fx: {what} needs {package}, which is not installed: pip install cachedit_fx[{extra}]")
