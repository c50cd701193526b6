"""Forecasters by name, as YAML and JSON have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cachedit_fx.errors import ConfigError, did_you_mean, shown
from cachedit_fx.forecasters.dmd import DMDCalibratorConfig
from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.foca import FoCaCalibratorConfig
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig

_BUILT_IN: dict[str, type[Forecaster]] = {
    "last": Forecaster,
    "taylorseer": TaylorSeerCalibratorConfig,
    "foca": FoCaCalibratorConfig,
    "dmd": DMDCalibratorConfig,
    "polynomial": PolynomialCalibratorConfig,
    "fitted": FittedCalibratorConfig,
}
_registered: dict[str, type[Forecaster]] = {}

Kind = TypeVar("Kind", bound=type[Forecaster])


def forecasters() -> dict[str, type[Forecaster]]:
    """Every class with its name, those built in first."""
    return _BUILT_IN | _registered


def register_forecaster(name: str) -> Callable[[Kind], Kind]:
    """Gives the decorated class a name, by which files can ask for it.

        @register_forecaster("mine")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Forecaster): ...

    Of a later class of the same name this one is forgotten.

    Raises:
        ConfigError: The name is none or a built-in one, or the class is no frozen dataclass made from `Forecaster`.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise ConfigError(
            f"cachedit_fx: register_forecaster takes a name other than {', '.join(map(repr, _BUILT_IN))}, got "
            f"{shown(name)}"
        )

    def keep(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Forecaster) and "__dataclass_params__" in vars(kind)):
            raise ConfigError(
                f"cachedit_fx: what is registered as {name!r} must be a class made from Forecaster and decorated with "
                f"@dataclass(frozen=True, kw_only=True), got {shown(kind)}"
            )
        _registered[name] = kind
        return kind

    return keep


def unregister_forecaster(name: str) -> None:
    """Forgets the class; nothing happens where there is none."""
    _registered.pop(name, None)


def forecaster_from(value: Forecaster | Mapping[str, Any] | str | None) -> Forecaster | None:
    """The forecaster that a configuration means: `{"type": "taylorseer", "taylorseer_order": 2}`, or its name alone.

    Raises:
        ConfigError: The name or a field is unknown, or a field has a value it cannot have.
    """
    if value is None or isinstance(value, Forecaster):
        return value
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or "type" not in fields:
        raise ConfigError(
            "cachedit_fx: forecaster must be None, a Forecaster, a name, or a mapping with a name under 'type', as "
            f"{{'type': 'taylorseer', 'taylorseer_order': 2}}, got {shown(value)}"
        )
    known, name = forecasters(), fields["type"]
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"cachedit_fx: forecaster's type must be one of {', '.join(map(repr, known))}, got {shown(name)}."
            f"{did_you_mean(name, known)}"
        )
    kind = known[name]
    given: dict[str, Any] = {str(field): setting for field, setting in fields.items() if field != "type"}
    missing = [f.name for f in dataclasses.fields(kind) if _is_needed(f) and f.name not in given]
    if missing:
        raise ConfigError(
            f"cachedit_fx: forecaster {name!r} takes {missing[0]}, which has no default; give it beside 'type', got "
            f"{shown(dict(fields))}"
        )
    return kind(**given)


def as_mapping(forecaster: Forecaster | None) -> dict[str, Any] | None:
    """What `forecaster_from` makes this forecaster of: its name, and the fields that are not at their defaults.

    Raises:
        ConfigError: Its class is not registered.
    """
    if forecaster is None:
        return None
    name = next((name for name, kind in forecasters().items() if kind is type(forecaster)), None)
    if name is None:
        raise ConfigError(
            f"cachedit_fx: a forecaster in a file must have a name, got a {type(forecaster).__name__}; give this class "
            "one with @cachedit_fx.register_forecaster"
        )
    fields = [f for f in dataclasses.fields(forecaster) if f.init]
    return {"type": name} | {f.name: getattr(forecaster, f.name) for f in fields if not _is_default(forecaster, f)}


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _is_default(forecaster: Forecaster, field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(getattr(forecaster, field.name) == field.default_factory())
    return bool(getattr(forecaster, field.name) == field.default)
