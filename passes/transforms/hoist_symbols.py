"""Moves sizes and lifted numbers out of the blocks, so that only tensors cross a cut.

    size_1 = sym_sum([s39, s50])  in block 0, read by block 5     ->     computed in front of everything

With dynamic shapes Dynamo computes a size once, inside whichever block asks first, and later blocks read it there.
A size is an expression over the graph's inputs, so it can be computed anywhere; here, before the first block.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cachedit_fx.patterns.nodes import value_of

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def hoist_symbols(gm: fx.GraphModule) -> bool:
    """Computes every size that a node reads in front of the graph. Returns whether anything changed."""
    graph = gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if not placeholders:
        return False
    bound = {
        value_of(node).node.expr: node
        for node in placeholders
        if isinstance(value_of(node), torch.SymInt) and isinstance(value_of(node).node.expr, sympy.Symbol)
    }
    front = placeholders[-1].next  # Everything new goes before this node, in order.
    made: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output", "get_attr") or not isinstance(value_of(node), _SYMBOLIC):
            continue
        new = _build(graph, front, bound, made, value_of(node))
        if new is not None:
            node.replace_all_uses_with(new)
            changed = True
    if changed:
        _erase_dead_sizes(graph)
        graph.lint()
        gm.recompile()
    return changed


def _build(
    graph: fx.Graph, front: fx.Node, bound: dict[Any, fx.Node], made: dict[Any, fx.Node], value: Any
) -> fx.Node | None:
    """A node that computes `value` from the placeholders' symbols; None where it has others."""
    expr = value.node.expr
    if expr in bound:
        return bound[expr]
    if not isinstance(value, torch.SymInt) or not expr.free_symbols or not expr.free_symbols <= set(bound):
        return None
    if expr not in made:
        with graph.inserting_before(front):
            tracer = fx.proxy.GraphAppendingTracer(graph)
            env = {symbol: fx.Proxy(bound[symbol], tracer) for symbol in expr.free_symbols}
            last = front.prev
            try:
                proxy = sympy_interp(PythonReferenceAnalysis, env, expr)
            except (fx.proxy.TraceError, TypeError, KeyError):  # A function that asks for the value, as a square root.
                while front.prev is not last:
                    graph.erase_node(front.prev)
                return None
        made[expr] = proxy.node
        made[expr].meta["example_value"] = value
    return made[expr]


def _erase_dead_sizes(graph: fx.Graph) -> None:
    """Only what this pass made useless goes: `eliminate_dead_code` would drop in-place writes too."""
    for node in reversed(graph.nodes):
        is_size = isinstance(value_of(node), _SYMBOLIC) or (node.op == "call_method" and node.target == "size")
        if node.op in ("call_function", "call_method") and not node.users and is_size and node.target != "item":
            graph.erase_node(node)
