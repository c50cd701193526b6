"""Moves the computation of sizes out of the blocks, so that only tensors cross a cut.

    size_1 = sym_sum([s39, s50])  in block 0, read by block 5     ->     computed before all tensors

With dynamic shapes, Dynamo computes a size once, in the first block that needs it, and later blocks read it from there.
A size is an expression over the inputs of the graph, so it can be computed before the first block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cachedit_fx.passes.extract import free_sizes
from cachedit_fx.passes.graph_pass import GraphPass
from cachedit_fx.patterns.nodes import value_of

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class HoistSymbols(GraphPass):
    """Computes every size that a node reads at the front of the graph, once."""

    name = "hoist-symbols"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        if not placeholders:
            return PassResult(graph_module, False)
        bound = {value_of(node).node.expr: node for node in free_sizes(graph)}
        front = placeholders[-1].next  # New nodes are inserted before this one, in order.
        made: dict[Any, fx.Node] = {}
        modified = False
        for node in list(graph.nodes):
            if not _is_computed_symbol(node):
                continue
            new = _build(graph, front, bound, made, value_of(node))
            if new is not None:
                node.replace_all_uses_with(new)
                modified = True
        if modified:
            _erase_dead_sizes(graph)
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        graph = graph_module.graph
        inputs = {value_of(node).node.expr for node in free_sizes(graph)}
        for node in graph.nodes if inputs else ():
            if _is_computed_symbol(node) and node.users:
                assert value_of(node).node.expr not in inputs, f"{node} computes a size that is an input of the graph"


def _is_computed_symbol(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "output", "get_attr") and isinstance(value_of(node), _SYMBOLIC)


def _build(
    graph: fx.Graph, front: fx.Node, bound: dict[Any, fx.Node], made: dict[Any, fx.Node], value: Any
) -> fx.Node | None:
    """A node that computes `value` from the symbols of the placeholders; None if it depends on other symbols."""
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
            except (fx.proxy.TraceError, TypeError, KeyError):  # A function that needs a number, such as sqrt.
                while front.prev is not last:
                    graph.erase_node(front.prev)
                return None
        made[expr] = proxy.node
        made[expr].meta["example_value"] = value
    return made[expr]


def _erase_dead_sizes(graph: fx.Graph) -> None:
    """Erases the sizes that nothing reads any more. `eliminate_dead_code` would also erase writes in place."""
    for node in reversed(graph.nodes):
        is_size = isinstance(value_of(node), _SYMBOLIC) or (node.op == "call_method" and node.target == "size")
        if node.op in ("call_function", "call_method") and not node.users and is_size and node.target != "item":
            graph.erase_node(node)
