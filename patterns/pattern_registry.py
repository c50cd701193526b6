"""The registered templates, in the order in which they are tried: users' templates first, then the built-in ones."""

from __future__ import annotations

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.patterns.template import BUILT_IN, BlockTemplate

_registered: list[BlockTemplate] = []


def register_pattern(template: BlockTemplate) -> BlockTemplate:
    """Registers a template and returns it. It is tried before all others, and replaces one of the same name.

    Graphs that are already compiled do not change; `torch._dynamo.reset()` makes Dynamo compile them again.

    Raises:
        ConfigError: `template` is not a BlockTemplate, or has a number.
    """
    if not isinstance(template, BlockTemplate):
        raise ConfigError(f"cachedit_fx: register_pattern takes a BlockTemplate, got {shown(template)}")
    if template.number is not None:
        raise ConfigError(
            "cachedit_fx: number must be None in a template to register (only the built-in patterns have numbers), "
            f"got {template.number!r} in {template}"
        )
    unregister_pattern(template.name)
    _registered.insert(0, template)
    return template


def unregister_pattern(name: str) -> None:
    """Removes the registered template of this name, if there is one."""
    _registered[:] = [known for known in _registered if known.name != name]


def templates() -> tuple[BlockTemplate, ...]:
    """All templates in the order in which they are tried. The first one that fits is used."""
    return (*_registered, *BUILT_IN)
