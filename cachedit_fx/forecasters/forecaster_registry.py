"""Maps names to forecaster classes, for configurations in YAML and JSON."""

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
    """Returns all forecaster classes by name, the built-in ones first."""
    return _BUILT_IN | _registered


def register_forecaster(name: str) -> Callable[[Kind], Kind]:
    """Registers the decorated class under a name, which configuration files can use.

        @register_forecaster("mine")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Forecaster): ...

    A class that is registered later under the same name replaces this one.

    Raises:
        ConfigError: The name is empty, not a string or the name of a built-in class, or the class is not a dataclass
            derived from `Forecaster`.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN:
        raise ConfigError(
            f"cachedit_fx: register_forecaster takes a name other than {', '.join(map(repr, _BUILT_IN))}, got "
            f"{shown(name)}"
        )

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Forecaster) and "__dataclass_params__" in vars(kind)):
            raise ConfigError(
                f"cachedit_fx: the class registered as {name!r} must be a class derived from Forecaster and decorated "
                f"with @dataclass(frozen=True, kw_only=True), got {shown(kind)}"
            )
        _registered[name] = kind
        return kind

    return register


def unregister_forecaster(name: str) -> None:
    """Removes a registered class. Nothing happens if there is none of this name."""
    _registered.pop(name, None)


def forecaster_from(value: Forecaster | Mapping[str, Any] | str | None) -> Forecaster | None:
    """Returns the forecaster for a configuration: `{"type": "taylorseer", "taylorseer_order": 2}`, or just its name.

    Raises:
        ConfigError: The name or a field is unknown, or the value of a field is not allowed.
    """
    if value is None or isinstance(value, Forecaster):
        return value
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or "type" not in fields:
        raise ConfigError(
            "cachedit_fx: forecaster must be None, a Forecaster, a name, or a mapping with a name under 'type', such "
            f"as {{'type': 'taylorseer', 'taylorseer_order': 2}}, got {shown(value)}"
        )
    classes, name = forecasters(), fields["type"]
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(
            f"cachedit_fx: forecaster's type must be one of {', '.join(map(repr, classes))}, got {shown(name)}."
            f"{did_you_mean(name, classes)}"
        )
    kind = classes[name]
    given: dict[str, Any] = {str(field): setting for field, setting in fields.items() if field != "type"}
    missing = [f.name for f in dataclasses.fields(kind) if _is_needed(f) and f.name not in given]
    if missing:
        raise ConfigError(
            f"cachedit_fx: forecaster {name!r} needs a value for {missing[0]}, which has no default; add it next to "
            f"'type', got {shown(dict(fields))}"
        )
    return kind(**given)


def as_mapping(forecaster: Forecaster | None) -> dict[str, Any] | None:
    """Returns the mapping from which `forecaster_from` creates this forecaster.

    It holds the name of the class, and the fields that differ from their defaults.

    Raises:
        ConfigError: The class is not registered.
    """
    if forecaster is None:
        return None
    name = next((name for name, kind in forecasters().items() if kind is type(forecaster)), None)
    if name is None:
        raise ConfigError(
            f"cachedit_fx: a forecaster in a file must have a name, got a {type(forecaster).__name__}; register its "
            "class with @cachedit_fx.forecasters.register_forecaster"
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
