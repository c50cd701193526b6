"""What a field of a forecaster may hold, and what is said of one that holds something else."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cachedit_fx.errors import ConfigError, did_you_mean, listed, shown


def check_names(of: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ConfigError unless every name that was given is a field."""
    known = list(allowed)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"cachedit_fx: field {name!r} of forecaster {of} is unknown.{did_you_mean(name, known)}\n"
                f"{listed([f'Allowed: {known[0]}', *known[1:]])}."
            )


def check_int(field: str, value: object, *, least: int) -> None:
    """Raises ConfigError unless the value is an int of at least this."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cachedit_fx: {field} must be an int >= {least}, got {shown(value)}")


def check_number(field: str, value: object) -> None:
    """Raises ConfigError unless the value is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"cachedit_fx: {field} must be a finite number >= 0, got {shown(value)}")


def check_switch(field: str, value: object) -> None:
    """Raises ConfigError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"cachedit_fx: {field} must be True or False, got {shown(value)}")


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is one of these texts."""
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(value, allowed)
        raise ConfigError(
            f"cachedit_fx: {field} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.{hint}"
        )
