"""The templates that are tried, in order: users' own, the newest first, then the built-in ones."""

from __future__ import annotations

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.patterns.template import BUILT_IN, BlockTemplate

_registered: list[BlockTemplate] = []


def register_pattern(template: BlockTemplate) -> BlockTemplate:
    """Adds a template, tried before the built-in ones; returns it. One of the same name is replaced.

    Graphs that are compiled already keep what they matched; `torch._dynamo.reset()` makes them match again.

    Raises:
        ConfigError: `template` is no BlockTemplate, or takes the number of a built-in one.
    """
    if not isinstance(template, BlockTemplate):
        raise ConfigError(f"cachedit_fx: register_pattern takes a BlockTemplate, got {shown(template)}")
    if template.number is not None:
        raise ConfigError(
            "cachedit_fx: number must be None in a template to register (numbers are those of the built-in patterns), "
            f"got {template.number!r} in {template}"
        )
    unregister_pattern(template.name)
    _registered.insert(0, template)
    return template


def unregister_pattern(name: str) -> None:
    """Takes the user's template of this name out again; nothing happens where there is none."""
    _registered[:] = [known for known in _registered if known.name != name]


def templates() -> tuple[BlockTemplate, ...]:
    """All templates in the order in which they are tried; the first that fits wins."""
    return (*_registered, *BUILT_IN)
