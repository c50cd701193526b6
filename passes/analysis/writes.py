"""What a graph writes in place, and into whose storage: such nodes must not be skipped or moved. Reads only."""

from __future__ import annotations

import inspect
import operator

import torch
from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.patterns.nodes import value_of

_IN_PLACE_OPERATORS = {
    *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(operator.ifloordiv, operator.imod, operator.imatmul, operator.ipow, operator.iand, operator.ior, operator.ixor),
}


def written_outside(program: Program, nodes: list[fx.Node]) -> fx.Node | None:
    """The first of `nodes` that writes in place into storage that was made by any other node."""
    if not any(map(is_in_place, nodes)):
        return None
    inside = set(nodes)
    mine = {storage_of(n) for n in nodes} - {None}
    others = {storage_of(n) for n in program.nodes if n not in inside and n.op != "output"}
    for node in nodes:
        if is_in_place(node):
            storage = storage_of(target_of(node))
            # An alias of something made outside shares its storage with it; what cannot be told is refused.
            if storage is None or storage in others or storage not in mine:
                return node
    return None


def written_between(program: Program, stream: fx.Node, start: int, stop: int) -> fx.Node | None:
    """What the Fn blocks write into the stream that entered them: the residual would be taken against the result.

    Before the first block a stream may well be filled in place (a joint buffer of text and image).
    """
    for node in program.nodes[start:stop]:
        if is_in_place(node) and storage_of(target_of(node)) in (None, storage_of(stream)):
            return node
    return None


def is_in_place(node: fx.Node) -> bool:
    """Whether the node writes into its first argument (or `out=`)."""
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    functional = name.endswith("_") and not name.endswith("__") and name not in ("is_", "not_", "and_", "or_")
    by_keyword = node.kwargs.get("out") is not None or _is_told_inplace(node)
    return node.target in _IN_PLACE_OPERATORS or functional or by_keyword


def _is_told_inplace(node: fx.Node) -> bool:
    """Whether the node is called with `inplace=True`, by keyword or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    if not any(arg is True for arg in node.args):  # Signatures are slow to find.
        return False
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # Built-in functions have no signature, nor such an argument.
        return False
    return bound.arguments.get("inplace") is True


def target_of(node: fx.Node) -> fx.Node | None:
    """What an in-place node writes into; None where that can't be told."""
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
    value = value_of(node) if node is not None else None
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
