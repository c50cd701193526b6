"""Takes some nodes of a graph out into a GraphModule of their own."""

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
    """A GraphModule of class `name` that generates its code when it is first run or printed, as Dynamo's own do.

    Most are rewritten before that. A `forward` that is kept has to be taken after `generate_code`.

    Args:
        root: Holds the attributes that `graph` reads.
    """
    module: fx.GraphModule = _LazyGraphModule(root, graph, class_name=name)
    return module


def generate_code(gm: fx.GraphModule) -> None:
    """Generates the code of a GraphModule, if that was put off."""
    _LazyGraphModule.force_recompile(gm)


@dataclass(slots=True)
class Extract:
    """A run of nodes as a graph of its own.

    Attributes:
        graph: Its graph, still without an output: see `finish`.
        inputs: Nodes of the source graph that stand behind the placeholders, in order of first use.
        copies: Source node -> its copy.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    copies: dict[fx.Node, fx.Node]

    def take(self, node: fx.Node) -> fx.Node:
        """The copy of `node`; one from outside becomes a placeholder.

        An attribute is read again instead, and so is a number that Dynamo lifted as a 0-dim input: compilers take
        tensors and ints between pieces, but no symbolic floats.
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
        # Without an anchor `inserting_before(root)` would append; the graph's root precedes its first node.
        anchor = last if last is not None else self.graph._root
        with self.graph.inserting_after(anchor):
            placeholder = self.graph.placeholder(node.name)
        placeholder.meta = copy.copy(node.meta)
        return placeholder

    def finish(self, root: fx.GraphModule, outputs: Sequence[fx.Node], name: str) -> fx.GraphModule:
        """The GraphModule that returns the tuple of `outputs` (nodes of this graph)."""
        self.graph.output(tuple(outputs))
        return graph_module(root, self.graph, name)


def extract(nodes: Sequence[fx.Node], sizes: Sequence[fx.Node] | None = None) -> Extract:
    """Copies `nodes` (in program order) into a new graph; what they read from outside becomes placeholders.

    Args:
        sizes: The `free_sizes` of their graph, where they are known; finding them looks at all of its inputs.
    """
    taken = Extract(fx.Graph(), [], {})
    inside = set(nodes)
    if not nodes:
        return taken
    for size in free_sizes(nodes[0].graph) if sizes is None else sizes:
        taken.take(size)  # A compiler wants every symbol in an input's shape or stride as an input of its own.
    for node in nodes:  # Placeholders first, in the order of first use: they must stand before all else.
        for arg in node.all_input_nodes:
            if arg not in inside:
                taken.take(arg)
    for node in nodes:
        taken.copies[node] = taken.graph.node_copy(node, taken.take)
    return taken


def free_sizes(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs that are a symbol each."""
    found = []
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found.append(node)
    return found


def outputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `nodes` that anything else reads, in order."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]
