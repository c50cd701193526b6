"""Replaces writes in place by operations that return a new tensor, where nothing can tell the difference.

x += attn(x)     ->     x_1 = x + attn(x)        where nothing else can see that x was written into
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cachedit_fx.passes.analysis.dataflow import is_layout
from cachedit_fx.passes.analysis.op_tables import OUT_OF_PLACE_METHODS, OUT_OF_PLACE_OPERATORS
from cachedit_fx.passes.analysis.writes import storage_of
from cachedit_fx.patterns.nodes import value_of


def functionalize_writes(gm: fx.GraphModule) -> bool:
    """Makes additions (and the like) in place such that return a new tensor. Returns whether anything changed.

    Only where the result is bit for bit the same: the written tensor belongs to the graph, no other view of it made
    before is read afterwards, and shape and dtype of the result are its own.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    by_storage: dict[int | None, list[fx.Node]] = defaultdict(list)
    for node in position:
        by_storage[storage_of(node)].append(node)
    changed = False
    for node in list(position):
        written = _replaceable(node)
        if written is None or not _is_unobservable(node, written, by_storage[storage_of(written)], position):
            continue
        for user in [user for user in written.users if position[user] > position[node]]:
            user.replace_input_with(written, node)
        known: Mapping[Any, Any] = OUT_OF_PLACE_METHODS if node.op == "call_method" else OUT_OF_PLACE_OPERATORS
        node.target = known[node.target]
        node.op = "call_function"
        changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def _replaceable(node: fx.Node) -> fx.Node | None:
    """What the node writes into, if its operation has a form that does not write, with the same result."""
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
