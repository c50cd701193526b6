"""What a user can see go wrong."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """An option is unknown or has a value that it cannot have. Names the field, the value, what is allowed."""


class NoMatchError(RuntimeError):
    """`on_no_match="raise"` and the graph cannot be cached. The message is the one a fallback would have logged."""


class PassError(RuntimeError):
    """A pass raised, or left a graph that does not lint. Always a bug in cachedit_fx, never in the model."""


class PatternError(RuntimeError):
    """What a user declared of a model (`BlockAdapter`) is not what its graph shows, or a patch functor failed.

    Attributes:
        mismatch: The `Mismatch` of the declared pattern; None where no pattern is at fault.
    """

    def __init__(self, message: str, mismatch: Any = None) -> None:
        super().__init__(message)
        self.mismatch = mismatch
