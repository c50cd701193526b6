"""Whether a model's region is still made of the modules and weights that its residual was computed with.

A reused step runs nothing of the region, so nothing else would notice a block that was replaced, an attention processor
that was set, or weights that were loaded between two steps. The look is shallow, for it is taken at every call.
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
    """Remembers what a region is made of.

    Args:
        module: The whole model.
        paths: Of the region's blocks.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        blocks = [*_modules_at(module, paths)]
        inner = [*_holders(module, paths), *itertools.chain.from_iterable(block.modules() for block in blocks)]
        self._children = [one._modules for one in inner if one._modules]
        # Attention processors and the like: objects that are no modules.
        objects = [(vars(one), name) for block in blocks for one in block.modules() for name in _objects_of(one)]
        # One weight speaks for a block: where weights are loaded, all of them change.
        slots = [found[0] for found in map(_weights_of, blocks) if found]
        self._counted = [holder[name] for holder, name in slots if not holder[name].is_inference()]
        places = [*objects, *slots]
        self._holders = [holder for holder, _ in places]
        self._names = [name for _, name in places]
        self._dicts = DictVersions([*self._children, *self._holders])
        self._known = [*map(dict.get, self._holders, self._names)]
        self._known_children, self._versions = self._look_at_children(), self._look_at_versions()

    def has_changed(self) -> bool:
        """Whether anything is another object than it was, or was written in place."""
        if not self._dicts.are_same():
            dicts = DictVersions([*self._children, *self._holders])
            # Tensors are compared by what they are, not by their values.
            is_same = all(map(operator.is_, map(dict.get, self._holders, self._names), self._known))
            if not is_same or self._look_at_children() != self._known_children:
                return True
            self._dicts = dicts  # Something else was written, as an attribute that a module keeps for itself.
        return self._look_at_versions() != self._versions

    def _look_at_children(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(dict.values, self._children))]

    def _look_at_versions(self) -> list[int]:
        return [*map(_version, self._counted)]


_version = operator.attrgetter("_version")


def _holders(module: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The model and the lists that the blocks are in."""
    return _modules_at(module, {".".join(path.split(".")[:i]) for path in paths for i in range(path.count(".") + 1)})


def _modules_at(module: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The modules at `paths`, which may lead through plain lists."""
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
    """Where its tensors are: parameters, then buffers."""
    modules = [*block.modules()]
    holders: list[dict[str, Any]] = [*(one._parameters for one in modules), *(one._buffers for one in modules)]
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]
