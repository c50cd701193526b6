"""Replaces writes in place by operations that return a new tensor, if nothing can observe the difference.

x += attn(x)     ->     x_1 = x + attn(x)        if no other tensor shows the write
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.analysis.dataflow import is_layout
from cachedit_fx.passes.analysis.op_tables import OUT_OF_PLACE_METHODS, OUT_OF_PLACE_OPERATORS
from cachedit_fx.passes.analysis.writes import storage_of
from cachedit_fx.passes.graph_pass import GraphPass
from cachedit_fx.patterns.nodes import value_of


class FunctionalizeWrites(GraphPass):
    """Replaces additions, subtractions, multiplications and divisions in place.

    A write is replaced only if the results are bitwise equal: the graph itself created the written tensor, no view of
    it that was created before the write is read afterwards, and the result has its shape and dtype.
    """

    name = "functionalize-writes"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        writes = [node for node in graph_module.graph.nodes if _replaceable(node) is not None]
        return PassResult(graph_module, bool(writes) and _functionalize(graph_module.graph, writes))


def _functionalize(graph: fx.Graph, writes: Sequence[fx.Node]) -> bool:
    """Replaces those of `writes` that nothing can observe. Returns whether there were any."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    by_storage: dict[int | None, list[fx.Node]] = defaultdict(list)
    for node in position:
        by_storage[storage_of(node)].append(node)
    changed = False
    for node in writes:
        written = _replaceable(node)
        if written is None or not _is_unobservable(node, written, by_storage[storage_of(written)], position):
            continue
        for user in [user for user in written.users if position[user] > position[node]]:
            user.replace_input_with(written, node)
        known: Mapping[Any, Any] = OUT_OF_PLACE_METHODS if node.op == "call_method" else OUT_OF_PLACE_OPERATORS
        node.target = known[node.target]
        node.op = "call_function"
        changed = True
    return changed


def _replaceable(node: fx.Node) -> fx.Node | None:
    """The tensor that the node writes into, if an operation with the same result returns a new tensor instead."""
    known = node.target in (OUT_OF_PLACE_METHODS if node.op == "call_method" else OUT_OF_PLACE_OPERATORS)
    written = node.args[0] if known and len(node.args) == 2 and not node.kwargs else None
    if not isinstance(written, fx.Node) or written.op == "placeholder":
        return None
    mine, other = value_of(written), node.args[1]
    theirs = value_of(other) if isinstance(other, fx.Node) else other
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor | int | float):
        return None
    return written if torch.result_type(mine, theirs) == mine.dtype else None


def _is_unobservable(node: fx.Node, written: fx.Node, aliases: list[fx.Node], position: Mapping[fx.Node, int]) -> bool:
    at = position[node]
    maker = min(aliases, key=position.__getitem__)
    if any(arg.op == "get_attr" and value_of(arg) is None for arg in maker.all_input_nodes) and is_layout(maker):
        return False  # A view of an attribute whose storage is not known.
    for alias in aliases:
        if alias.op in ("placeholder", "get_attr"):
            return False
        is_earlier = position[alias] < at and alias is not written
        if is_earlier and any(position[user] > at for user in alias.users):
            return False
    return storage_of(written) is not None
