"""Copies nodes of a graph to a GraphModule of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from cachedit_fx.patterns.nodes import value_of


def graph_module(root: torch.nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule of class `name` that generates its code when it is first run or printed, like those of Dynamo.

    Most are rewritten before that. Call `generate_code` before storing a reference to its `forward`.

    Args:
        root: The module whose attributes `graph` reads.
    """
    module: fx.GraphModule = _LazyGraphModule(root, graph, class_name=name)
    return module


def generate_code(gm: fx.GraphModule) -> None:
    """Generates the code of a GraphModule that was created by `graph_module`."""
    _LazyGraphModule.force_recompile(gm)


@dataclass(slots=True)
class Extract:
    """Nodes of a source graph, copied to a graph of their own.

    Attributes:
        graph: The new graph. It has no output before `finish` is called.
        inputs: The nodes of the source graph that the placeholders stand for, in order of first use.
        copies: Node of the source graph -> its copy.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    copies: dict[fx.Node, fx.Node]

    def take(self, node: fx.Node) -> fx.Node:
        """The copy of `node`. A node that has none yet gets a placeholder.

        Attributes and numbers that Dynamo lifted as 0-dim inputs are read again instead, because only tensors and ints
        can be passed between compiled pieces, not symbolic floats.
        """
        if node not in self.copies:
            if node.op == "get_attr" or node.target == "item":
                self.copies[node] = self.graph.node_copy(node, self.take)
            else:
                self.copies[node] = self._placeholder(node)
                self.inputs.append(node)
        return self.copies[node]

    def _placeholder(self, node: fx.Node) -> fx.Node:
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        # The root of a graph precedes its first node.
        anchor = last if last is not None else self.graph._root
        with self.graph.inserting_after(anchor):
            placeholder = self.graph.placeholder(node.name)
        placeholder.meta = copy.copy(node.meta)
        return placeholder

    def finish(self, root: fx.GraphModule, outputs: Sequence[fx.Node], name: str) -> fx.GraphModule:
        """The GraphModule, which returns the tuple of `outputs` (nodes of the new graph)."""
        self.graph.output(tuple(outputs))
        return graph_module(root, self.graph, name)


def extract(nodes: Sequence[fx.Node], sizes: Sequence[fx.Node] | None = None) -> Extract:
    """Copies `nodes` (in program order) to a new graph. Other nodes that they read become placeholders.

    Args:
        sizes: The `free_sizes` of their graph; by default they are determined, which visits all of its inputs.
    """
    taken = Extract(fx.Graph(), [], {})
    inside = set(nodes)
    if not nodes:
        return taken
    for size in free_sizes(nodes[0].graph) if sizes is None else sizes:
        taken.take(size)  # Inductor requires every symbol in the shape or stride of an input as an input of its own.
    for node in nodes:  # Placeholders come first, in order of first use.
        for arg in node.all_input_nodes:
            if arg not in inside:
                taken.take(arg)
    for node in nodes:
        taken.copies[node] = taken.graph.node_copy(node, taken.take)
    return taken


def free_sizes(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of the graph that are symbols (dynamic sizes)."""
    found = []
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found.append(node)
    return found


def outputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `nodes` that other nodes read, in order."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]
