"""What the fields of `CacheConfig` accept, where a range or a list of choices does not say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.forecaster_registry import forecaster_from


class Decides(Protocol):
    """What `CacheConfig.decider` needs. `cachedit_fx.policies.Decider` says what it is shown and what it answers."""

    def decide(self, step: Any) -> bool | None: ...


def as_forecaster(field: str, value: object) -> Forecaster | None:
    """A forecaster as it may be given: itself, or the mapping that a file has in its place.

    Raises:
        ConfigError: It is neither, or the mapping names no forecaster.
    """
    if value is None or isinstance(value, Forecaster):
        return value
    if isinstance(value, Mapping | str):
        return forecaster_from(value)
    hint = f"; give {value.__name__}()" if isinstance(value, type) and issubclass(value, Forecaster) else ""
    raise ConfigError(
        f"cachedit_fx: {field} must be a Forecaster, its name or its mapping, or None, got {shown(value)}{hint}."
    )


def is_decider(value: object) -> bool:
    """Whether a value can decide, and be part of a configuration, which is hashable."""
    has_method = not isinstance(value, type) and callable(getattr(value, "decide", None))
    return has_method and type(value).__hash__ is not None


def inner_backends() -> list[str]:
    """The names of the backends that can compile the pieces."""
    return [name for name in torch.compiler.list_backends(exclude_tags=()) if name != "cachedit"]


def compile_modes() -> list[str]:
    """The modes of `torch.compile`."""
    from torch._inductor import list_mode_options

    return sorted({"default", *list_mode_options()})
