"""Whether a model's region is still made of the modules and weights that its residual was computed with.

A reused step runs nothing of the region, so nothing else would notice a block that was replaced, an attention processor
that was set, or weights that were loaded between two steps. The look is shallow, for it is taken at every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_PLAIN = (torch.Tensor, nn.Module, str, bytes, int, float, complex, bool, type(None), type, tuple, list, dict, set)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.Size)


class RegionWatch:
    """Remembers what a region is made of.

    Args:
        module: The whole model.
        paths: Of the region's blocks.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []  # Of every module that has any.
        self._objects: list[tuple[dict[str, Any], str, Any]] = []  # Attention processors and the like.
        self._weights: list[
            tuple[dict[str, Any], str, torch.Tensor, int]
        ] = []  # The first and the last of every block.
        for holder in _holders(module, paths):
            self._watch_children(holder)
        for block in map(module.get_submodule, paths):
            for inner in block.modules():
                self._watch_children(inner)
                self._objects += [(vars(inner), name, value) for name, value in _objects_of(inner)]
            weights = [*_weights_of(block)]
            ends = (weights[0], weights[-1]) if weights else ()
            self._weights += [(holder, name, weight, _version(weight)) for holder, name, weight in ends]

    def has_changed(self) -> bool:
        """Whether anything is another object than it was, or was written in place."""
        return not (
            all(tuple(children.values()) == known for children, known in self._children)
            and all(attributes.get(name) is known for attributes, name, known in self._objects)
            and all(
                weights.get(name) is known and _version(known) == version
                for weights, name, known, version in self._weights
            )
        )

    def _watch_children(self, module: nn.Module) -> None:
        if module._modules:
            self._children.append((module._modules, tuple(module._modules.values())))


def _holders(module: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The model and the lists that the blocks are in."""
    for above in {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)}:
        yield module.get_submodule(above)


def _objects_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and not isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH)):
            yield name, value


def _weights_of(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for module in block.modules():
        for holder in (module._parameters, module._buffers):
            yield from ((holder, name, tensor) for name, tensor in holder.items() if tensor is not None)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
