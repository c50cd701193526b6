"""What the trace of a block depends on in the arguments of its call."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.frontend.trace_internals import (
    ModuleCall,
    UnknownError,
    content_of,
    is_input_of_frame,
    is_unread,
    name_of,
)

UNREAD = "unread"


@dataclass(slots=True)
class Arguments:
    """The arguments of a call.

    Attributes:
        kind: Equal for arguments with which Dynamo traces the same.
        leaves: The variables of the tensors and sizes in them, in order.
        nodes: Their nodes.
        unread: The variables that Dynamo has not built yet, because nothing has read them.
    """

    kind: Hashable
    leaves: list[Any]
    nodes: list[fx.Node]
    unread: list[Any]


def arguments_of(call: ModuleCall) -> Arguments:
    """The arguments of a call.

    Raises:
        UnknownError: They contain something that cannot be compared.
    """
    leaves: list[Any] = []
    nodes: list[fx.Node] = []
    unread: list[Any] = []
    position = itertools.count()  # Of a tensor, size or unread variable.
    first_position: dict[Any, int] = {}  # By node, and by memory.

    def describe(variable: Any) -> Hashable:
        if is_unread(variable):
            next(position)
            unread.append(variable)
            return (UNREAD, name_of(variable.source))
        kind, content = content_of(variable)
        if kind in ("tensor", "size"):
            example = content.meta["example_value"]
            here = next(position)
            leaves.append(variable.unwrap())
            nodes.append(content)
            which = (first_position.setdefault(content, here), content if is_input_of_frame(variable) else None)
            if kind == "size":
                return (kind, str(example), *which)
            return (kind, metadata_of(example), *which, first_position.setdefault(storage_of(example), here))
        if kind == "constant":
            return (kind, type(content), repr(content))
        if kind in ("tuple", "list"):
            return (kind, tuple(map(describe, content)))
        if kind == "dict":
            return (kind, tuple((type(key), repr(key), describe(value)) for key, value in content.items()))
        return (kind, id(content))

    kind = tuple((name, describe(variable)) for name, variable in call.variables.items())
    return Arguments(kind, leaves, nodes, unread)


def is_unchanged(before: Any, after: Any) -> bool:
    """Whether two kinds of arguments are equal, except for variables that have been read since."""
    if before == after:
        return True
    if not isinstance(before, tuple) or not isinstance(after, tuple):
        return False
    return before[:1] == (UNREAD,) or (len(before) == len(after) and all(map(is_unchanged, before, after)))


def storage_of(example: torch.Tensor) -> int:
    """Equal for tensors that share memory."""
    return int(example.untyped_storage()._cdata)


def metadata_of(example: Any) -> Hashable:
    """What operations can know of a tensor in a trace.

    Raises:
        UnknownError: It is not a plain tensor.
    """
    if type(example).__name__ != "FakeTensor" or example.layout != torch.strided or example.requires_grad:
        raise UnknownError("it handles a tensor that is not a plain one, or that requires gradients")
    if getattr(example, "constant", None) is not None:
        raise UnknownError("it handles a tensor whose content is known")
    sizes = (*example.size(), "/", *example.stride(), "/", example.storage_offset())
    return (tuple(map(str, sizes)), example.dtype, example.device, example.is_conj(), example.is_neg())
