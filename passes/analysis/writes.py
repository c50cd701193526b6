"""Which nodes write in place, and into which storage. Such nodes must be neither skipped nor moved."""

from __future__ import annotations

import inspect
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_weight
from cachedit_fx.passes.analysis.op_tables import (
    ALLOCATION_NAMES,
    IN_PLACE_METHOD,
    IN_PLACE_OPERATORS,
    NOT_IN_PLACE_NAMES,
)
from cachedit_fx.patterns.nodes import is_tensor, value_of


def written_outside(program: Program, nodes: list[fx.Node]) -> fx.Node | None:
    """The first of `nodes` that writes into storage that a node outside of `nodes` holds; None if there is none.

    A write that does the same at every step (`rebinds_weight`) does not count.
    """
    if not any(map(is_in_place, nodes)):
        return None
    inside = set(nodes)
    mine = {storage_of(n) for n in nodes} - {None}
    others = {storage_of(n) for n in program.nodes if n not in inside and n.op != "output"}
    for node in nodes:
        if is_in_place(node) and not rebinds_weight(node):
            target = target_of(node)
            storage = storage_of(target)
            if storage is None:  # As under `vmap`. It counts as outside unless `nodes` allocated it.
                is_own = target is not None and _is_allocated_by(target, inside, others)
            else:  # An alias of a value from outside shares its storage.
                is_own = storage in mine and storage not in others
            if not is_own:
                return node
    return None


def _is_allocated_by(target: fx.Node, nodes: AbstractSet[fx.Node], others: AbstractSet[int | None]) -> bool:
    """Whether one of `nodes` allocates the tensor, whose storage is unknown, and no alias of it leaves them.

    Every value that is computed from a tensor of unknown storage counts as an alias of it.

    Args:
        others: The storages that the other nodes hold.
    """
    if target not in nodes or not _is_allocation(target):
        return False
    aliases = [target]
    for node in aliases:  # Grows.
        for user in node.users:
            if user not in nodes or storage_of(user) in others - {None}:
                return False
            if is_tensor(user) and storage_of(user) is None and user not in aliases:
                aliases.append(user)
    return True


def written_between(program: Program, stream: fx.Node, start: int, stop: int) -> fx.Node | None:
    """The first node at the positions [start, stop) that writes into the storage of `stream`; None if there is none.

    The residual over these nodes would be computed with the overwritten stream.
    """
    nodes = program.nodes[start:stop]
    for node in nodes:
        target = target_of(node) if is_in_place(node) else None
        if not is_in_place(node) or (target in nodes and target is not stream and _is_allocation(target)):
            continue
        if storage_of(target) in (None, storage_of(stream)):
            return node
    return None


def _is_allocation(node: fx.Node | None) -> bool:
    """Whether the node returns a new tensor, which shares its storage with no other one."""
    return node is not None and getattr(node.target, "__name__", node.target) in ALLOCATION_NAMES


def is_in_place(node: fx.Node) -> bool:
    """Whether the node writes into its first argument (or `out=`)."""
    if node.op == "call_method":
        name = str(node.target)
        return name == IN_PLACE_METHOD or _says_in_place(name)
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    target: Any = node.target
    name = getattr(target, "__name__", "")
    by_name = _says_in_place(name) and name not in NOT_IN_PLACE_NAMES
    by_argument = node.kwargs.get("out") is not None or _has_inplace_argument(node)
    return target in IN_PLACE_OPERATORS or by_name or by_argument


def rebinds_weight(node: fx.Node) -> bool:
    """Whether the node makes a weight share the storage of another weight, without reading or writing any element.

    This is how Dynamo writes `self.weight.data = self.state.CB`, which bitsandbytes runs in every forward. A computed
    step has done so before the first reused step.
    """
    if getattr(node.target, "__name__", node.target) != "set_" or len(node.args) != 2 or node.kwargs:
        return False
    return all(isinstance(arg, fx.Node) and arg.op == "placeholder" and is_weight(arg) for arg in node.args)


def _says_in_place(name: str) -> bool:
    """Whether a name has the form by which torch marks operations that write in place, for example `add_`."""
    return name.endswith("_") and not name.endswith("__")


def _has_inplace_argument(node: fx.Node) -> bool:
    """Whether the node is called with `inplace=True`, by keyword or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    if not any(arg is True for arg in node.args):  # Reading a signature is slow.
        return False
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # Built-in functions have no signature, and no such argument.
        return False
    return bound.arguments.get("inplace") is True


def target_of(node: fx.Node) -> fx.Node | None:
    """The node whose value an in-place node writes into; None if it is unknown."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        written = [i for i, arg in enumerate(arguments) if arg.alias_info is not None and arg.alias_info.is_write]
        if len(written) != 1:
            return None
        i = written[0]
        found = node.args[i] if i < len(node.args) else node.kwargs.get(arguments[i].name)
        return found if isinstance(found, fx.Node) else None
    target: object = node.kwargs.get("out") or node.kwargs.get("input") or (node.args[0] if node.args else None)
    return target if isinstance(target, fx.Node) else None


def storage_of(node: fx.Node | None) -> int | None:
    """Address of the storage that a tensor node holds; None if it holds no tensor or no storage."""
    value = value_of(node) if node is not None else None
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
