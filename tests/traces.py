"""The observable state of modules, to check that the cache leaves no traces on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Same:
    """Holds a value that is compared by identity."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None


def traces_of(components: Mapping[str, Any]) -> dict[str, object]:
    """The classes, attributes, names of weights and hooks of all components that are modules."""
    parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    found: dict[str, object] = {f"{name} state_dict": [*part.state_dict()] for name, part in parts.items()}
    for name, part in parts.items():
        for path, module in part.named_modules():
            found[f"{name}.{path} class"] = type(module)
            found |= {f"{name}.{path} {key}": Same(value) for key, value in vars(module).items()}
            registry = vars(module).get("_diffusers_hook")
            found[f"{name}.{path} hooks"] = [*registry.hooks] if registry is not None else []
    return found
