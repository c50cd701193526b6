"""Detects whether the modules or weights of a region have changed since its residual was computed.

A reused step does not run the region. Without this check, a block that is replaced, an attention processor that is set,
or weights that are loaded between two steps would have no effect on it. The check is shallow, since it is made at every
call.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cachedit_fx.frontend.dict_versions import DictVersions

_PLAIN = (torch.Tensor, nn.Module, str, bytes, int, float, complex, bool, type(None), type, tuple, list, dict, set)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.Size)


class RegionWatch:
    """Remembers the modules and weights of a region.

    Args:
        module: The whole model.
        paths: The paths of the blocks of the region.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        blocks = [*_modules_at(module, paths)]
        inner = [*_holders(module, paths), *itertools.chain.from_iterable(block.modules() for block in blocks)]
        self._children = [one._modules for one in inner if one._modules]
        # Objects that are not modules, such as attention processors.
        objects = [(vars(one), name) for block in blocks for one in block.modules() for name in _objects_of(one)]
        # One weight per block is enough: loading weights changes all of them.
        slots = [found[0] for found in map(_weights_of, blocks) if found]
        self._counted = [holder[name] for holder, name in slots if not holder[name].is_inference()]
        places = [*objects, *slots]
        self._holders = [holder for holder, _ in places]
        self._names = [name for _, name in places]
        self._dicts = DictVersions([*self._children, *self._holders])
        self._values = [*map(dict.get, self._holders, self._names)]
        self._child_modules, self._versions = self._read_children(), self._read_versions()

    def has_changed(self) -> bool:
        """Whether an object has been replaced, or a weight has been written in place."""
        if not self._dicts.are_same():
            dicts = DictVersions([*self._children, *self._holders])
            # Tensors are compared by identity, not by their values.
            is_same = all(map(operator.is_, map(dict.get, self._holders, self._names), self._values))
            if not is_same or self._read_children() != self._child_modules:
                return True
            self._dicts = dicts  # Something else was written, for example another attribute of a module.
        return self._read_versions() != self._versions

    def _read_children(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(dict.values, self._children))]

    def _read_versions(self) -> list[int]:
        return [*map(_version, self._counted)]


_version = operator.attrgetter("_version")


def _holders(module: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The model, and the lists that contain the blocks."""
    return _modules_at(module, {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)})


def _modules_at(module: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The modules at `paths`. A path may lead through a Python list."""
    for path in paths:
        found: Any = module
        for name in path.split(".") if path else ():
            found = found[int(name)] if isinstance(found, list | tuple) else getattr(found, name, None)
        if isinstance(found, nn.Module):
            yield found


def _objects_of(module: nn.Module) -> list[str]:
    plain = (*_PLAIN, *_PLAIN_OF_TORCH)
    return [name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, plain)]


def _weights_of(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """The dictionary and the name of each tensor: parameters, then buffers."""
    modules = [*block.modules()]
    holders: list[dict[str, Any]] = [*(one._parameters for one in modules), *(one._buffers for one in modules)]
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]
