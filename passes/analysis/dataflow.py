"""Questions about the dataflow of a graph: positions, users, ancestors, and the inputs that a value depends on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from cachedit_fx.flops import flops_of
from cachedit_fx.passes.analysis.contexts import within_contexts
from cachedit_fx.passes.analysis.op_tables import (
    ADDITIONS,
    DIFFERENCES,
    LAYOUT_FUNCTIONS,
    LAYOUT_METHODS,
)
from cachedit_fx.patterns.names import is_conditioning_name
from cachedit_fx.patterns.nodes import base_name, is_tensor, shape_key, value_of


def is_layout(node: fx.Node) -> bool:
    """Whether the output of the node consists of elements of its inputs, possibly cast."""
    if node.op == "call_method":
        return node.target in LAYOUT_METHODS
    return node.op == "call_function" and node.target in LAYOUT_FUNCTIONS


def is_addition(node: fx.Node) -> bool:
    target: Any = node.target
    return target in ADDITIONS


def _is_difference(node: fx.Node) -> bool:
    target: Any = node.target
    return target in DIFFERENCES


class Program:
    """The nodes of a graph in program order, and what the analyses ask about them.

    Attributes:
        nodes: All nodes, including the placeholders and the output. A position is an index into this tuple.
        position: Node -> its position.
        by_name: Name -> node.
        flops: FLOPs of each node. Matrix products, attention and convolutions count; einsum counts as nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: tuple[fx.Node, ...] = tuple(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        # Loops mix their streams by an einsum (hyper-connections): that is computed again at a reused step, not cached.
        counts = zip(self.nodes, flops_of(self.nodes), strict=True)
        self.flops = [0 if node.target is torch.einsum else count for node, count in counts]

    def nodes_in(self, start: int, stop: int) -> Iterator[fx.Node]:
        """The nodes at the positions [start, stop), without placeholders, attributes and the output."""
        return (node for node in self.nodes[start:stop] if node.op not in ("placeholder", "get_attr", "output"))

    def used_in(self, node: fx.Node, start: int, stop: int) -> bool:
        """Whether a node at the positions [start, stop) reads `node`."""
        return any(start <= self.position[user] < stop for user in node.users)

    def read_from_before(self, start: int, stop: int) -> list[fx.Node]:
        """Values from before `start` that the nodes in [start, stop) read, in program order, without weights."""
        read = {
            arg for node in self.nodes_in(start, stop) for arg in node.all_input_nodes if self.position[arg] < start
        }
        return sorted((n for n in read if n.op != "get_attr" and not is_weight(n)), key=self.position.__getitem__)

    def ancestors_within(self, node: fx.Node, start: int, stop: int) -> set[fx.Node]:
        """`node` and its ancestors in [start, stop), and the values from outside of it that these nodes read."""
        visited, todo = {node}, [node]
        while todo:
            current = todo.pop()
            if not start <= self.position[current] < stop:
                continue
            fresh = [arg for arg in current.all_input_nodes if arg not in visited]
            visited.update(fresh)
            todo.extend(fresh)
        return visited

    def descendants_within(self, sources: set[fx.Node], start: int, stop: int) -> set[fx.Node]:
        """The nodes in [start, stop) that are computed from any of `sources`, without the sources."""
        found: set[fx.Node] = set()
        for node in self.nodes[start:stop]:
            if any(arg in sources or arg in found for arg in node.all_input_nodes):
                found.add(node)
        return found

    def residual_path(self, node: fx.Node, start: int) -> set[fx.Node]:
        """The values that reach `node` through additions and layout operations alone, back to the ones before `start`.

        A residual block adds to its stream. The stream that enters it is therefore on the residual path of the stream
        that leaves it.
        """
        visited, todo = {node}, [node]
        while todo:
            current = todo.pop()
            if self.position[current] < start:
                continue
            if is_addition(current) or is_layout(current):
                added = self._added(current, start)
                fresh = [arg for arg in added if arg not in visited and not is_weight(arg)]
                visited.update(fresh)
                todo.extend(fresh)
        return visited

    def _added(self, node: fx.Node, start: int) -> list[fx.Node]:
        """The operands that an addition or a layout operation passes on.

        A difference passes on its first operand, but none if the second one is on the residual path of the first.
        """
        operands = node.all_input_nodes
        if not is_addition(node) or not _is_difference(node) or len(operands) != 2:
            return operands
        taken_off = operands[1] in self.residual_path(operands[0], start)
        return [] if taken_off else operands[:1]

    @cached_property
    def within_contexts(self) -> frozenset[fx.Node]:
        """Nodes inside a context such as autocast, which may compute something else outside of it."""
        return within_contexts(self.nodes)

    @cached_property
    def _inputs_behind(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """Node -> the inputs that it depends on."""
        behind: dict[fx.Node, frozenset[fx.Node]] = {}
        empty: frozenset[fx.Node] = frozenset()
        for node in self.nodes:
            if node.op == "placeholder":
                behind[node] = empty if is_weight(node) or not is_tensor(node) else frozenset((node,))
                continue
            sets = {behind[arg] for arg in node.all_input_nodes}
            behind[node] = sets.pop() if len(sets) == 1 else empty.union(*sets)
        return behind

    def inputs_behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """The tensor inputs of the model, without weights, that `node` depends on."""
        return self._inputs_behind[node]

    def conditioning_behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """The inputs that `node` depends on and that may be a conditioning sequence (see `is_sequence`)."""
        return frozenset(source for source in self.inputs_behind(node) if self.is_sequence(source))

    def latent_inputs(self, hidden: fx.Node | None) -> frozenset[fx.Node]:
        """The inputs that change at every step: those that the hidden stream is computed from.

        A model may join text and image into one stream before its first block. In this case, the latents are the
        inputs with the shape of an output of the model. If there are none (image-to-video models take extra channels),
        they are the inputs that are not named like a conditioning.
        """
        behind = self.conditioning_behind(hidden) if hidden is not None else frozenset()
        alike = behind & self.like_outputs
        return alike or frozenset(node for node in behind if not is_named_conditioning(node))

    @cached_property
    def like_outputs(self) -> frozenset[fx.Node]:
        """The inputs of the model that have the shape of one of its outputs."""
        output = next(node for node in reversed(self.nodes) if node.op == "output")
        shapes = {shape_key(node) for node in output.all_input_nodes if is_tensor(node)}
        inputs = {source for sources in self._inputs_behind.values() for source in sources}
        return frozenset(node for node in inputs if shape_key(node) in shapes and self.is_sequence(node))

    def is_sequence(self, node: fx.Node) -> bool:
        """Whether the node is a floating-point tensor of at least three dimensions, for example [B, L, D]."""
        value = value_of(node)
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def is_named_conditioning(node: fx.Node) -> bool:
    return is_conditioning_name(base_name(node))


def is_weight(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or a buffer of the model, not an argument of the call."""
    info = node.meta.get("cachedit_input")
    return info is not None and info.is_weight
