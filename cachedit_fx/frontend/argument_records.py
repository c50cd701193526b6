"""Records the arguments of a call without the values of the tensors, to trace the same call again later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cachedit_fx.frontend.graph_records import NotSavedError, TensorRecord

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class ArgumentRecord:
    """The arguments of a call, and the modes in which it was made.

    Attributes:
        leaves: The arguments; a tensor is replaced by its number in `tensors`, as a `_Tensor`.
        spec: The structure of the arguments.
    """

    leaves: tuple[Any, ...]
    tensors: tuple[TensorRecord, ...]
    spec: pytree.TreeSpec
    has_grad: bool
    is_inference: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentRecord | None:
        """The record of the arguments; None if they contain something other than tensors and constants."""
        found, spec = pytree.tree_flatten((args, kwargs))
        leaves: list[Any] = []
        tensors: list[TensorRecord] = []
        numbers: dict[int, int] = {}  # The same tensor may be passed twice, which Dynamo checks.
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in numbers:
                    try:
                        tensors.append(TensorRecord.of(leaf))
                    except NotSavedError:
                        return None
                    numbers[id(leaf)] = len(tensors) - 1
                leaves.append(_Tensor(numbers[id(leaf)]))
            elif isinstance(leaf, _CONSTANTS):
                leaves.append(leaf)
            else:
                return None
        has_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return cls(tuple(leaves), tuple(tensors), spec, has_grad, is_inference)

    def make(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same kind, with new tensors."""
        tensors = [record.make() for record in self.tensors]
        leaves = [tensors[leaf.number] if isinstance(leaf, _Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The modes in which the call was made."""
        with torch.inference_mode(self.is_inference), torch.set_grad_enabled(self.has_grad):
            yield


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Replaces a tensor in the arguments."""

    number: int
