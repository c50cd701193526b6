"""Checks of the fields of a forecaster, and the errors for values that are not allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cachedit_fx.errors import ConfigError, did_you_mean, listed, shown


def check_names(of: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ConfigError unless every given name is the name of a field."""
    fields = list(allowed)
    orders = (field for field in fields if field.endswith("order"))
    synonyms = dict.fromkeys(("order", "max_order", "n_derivatives", "num_derivatives", "degree"), next(orders, ""))
    for name in given:
        if name not in fields:
            raise ConfigError(
                f"cachedit_fx: field {name!r} of forecaster {of} is unknown.{did_you_mean(name, fields, synonyms)}\n"
                f"{listed([f'Allowed: {fields[0]}', *fields[1:]])}."
            )


def check_int(field: str, value: object, *, least: int) -> None:
    """Raises ConfigError unless the value is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cachedit_fx: {field} must be an int >= {least}, got {shown(value)}")


def check_number(field: str, value: object) -> None:
    """Raises ConfigError unless the value is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"cachedit_fx: {field} must be a finite number >= 0, got {shown(value)}")


def check_switch(field: str, value: object) -> None:
    """Raises ConfigError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"cachedit_fx: {field} must be True or False, got {shown(value)}")


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(value, allowed)
        raise ConfigError(
            f"cachedit_fx: {field} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.{hint}"
        )
