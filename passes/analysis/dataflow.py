"""A graph as a program: positions, spans, who reads what, and what a value was made from. Reads only."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from cachedit_fx.flops import flops_of
from cachedit_fx.passes.analysis.contexts import within_contexts
from cachedit_fx.patterns.nodes import base_name, is_tensor, shape_key, value_of

# What keeps a value, up to where it lies: views, copies, casts. A stream that only passed through these is itself.
LAYOUT_METHODS = {
    *("contiguous", "clone", "to", "type_as", "float", "half", "bfloat16", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "transpose", "permute", "expand", "narrow", "chunk", "split", "select", "detach"),
}
LAYOUT_FUNCTIONS = {
    *(operator.getitem, torch.cat, torch.concat, torch.split, torch.chunk, torch.narrow, torch.reshape),
    *(torch.flatten, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.clone),
}
_CONDITIONING_NAME = re.compile(
    r"encoder_hidden_states|prompt|context|cap|text|txt|clip|t5|cond|label|class", re.IGNORECASE
)
_ADDITIONS = {operator.add, operator.sub, operator.iadd, torch.add, torch.sub, "add", "sub", "add_"}


def is_layout(node: fx.Node) -> bool:
    """Whether the node moves values about and computes none."""
    if node.op == "call_method":
        return node.target in LAYOUT_METHODS
    return node.op == "call_function" and node.target in LAYOUT_FUNCTIONS


def is_addition(node: fx.Node) -> bool:
    target: Any = node.target
    return target in _ADDITIONS


def _is_difference(node: fx.Node) -> bool:
    return node.target in (operator.sub, torch.sub, "sub")


class Program:
    """The nodes of a graph in program order, with the questions that the passes ask of them.

    Attributes:
        nodes: All nodes, placeholders and the output included; a position is an index into it.
        flops: Per node, of matrix products, attention and convolutions; an einsum and the rest count as nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: tuple[fx.Node, ...] = tuple(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        # Loops mix their streams by an einsum (hyper-connections): that is computed again at a reused step, not cached.
        counts = zip(self.nodes, flops_of(self.nodes), strict=True)
        self.flops = [0 if node.target is torch.einsum else count for node, count in counts]

    def nodes_in(self, start: int, stop: int) -> Iterator[fx.Node]:
        return (node for node in self.nodes[start:stop] if node.op not in ("placeholder", "get_attr", "output"))

    def used_in(self, node: fx.Node, start: int, stop: int) -> bool:
        return any(start <= self.position[user] < stop for user in node.users)

    def read_from_before(self, start: int, stop: int) -> list[fx.Node]:
        """Values made before `start` that the nodes in [start, stop) read, in program order; no weights."""
        read = {
            arg for node in self.nodes_in(start, stop) for arg in node.all_input_nodes if self.position[arg] < start
        }
        return sorted((n for n in read if n.op != "get_attr" and not is_weight(n)), key=self.position.__getitem__)

    def ancestors_within(self, node: fx.Node, start: int, stop: int) -> set[fx.Node]:
        """What `node` was made from, walking back through [start, stop) and one step out of it; `node` included."""
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
        """What was made in [start, stop) from any of `sources`; the sources not included."""
        found: set[fx.Node] = set()
        for node in self.nodes[start:stop]:
            if any(arg in sources or arg in found for arg in node.all_input_nodes):
                found.add(node)
        return found

    def residual_path(self, node: fx.Node, start: int) -> set[fx.Node]:
        """What reaches `node` through additions and moves alone, back to the first value before `start`.

        A residual block adds to its stream, so the stream that entered is on the residual path of the one that leaves.
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
        """What an addition or a move hands on: of a difference the first operand, unless the second is taken off it."""
        operands = node.all_input_nodes
        if not is_addition(node) or not _is_difference(node) or len(operands) != 2:
            return operands
        taken_off = operands[1] in self.residual_path(operands[0], start)
        return [] if taken_off else operands[:1]

    @cached_property
    def within_contexts(self) -> frozenset[fx.Node]:
        """Nodes that do something different outside the context (as autocast) that they lie in."""
        return within_contexts(self.nodes)

    @cached_property
    def _inputs_behind(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """User inputs that each node was made from."""
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
        """The model's own tensor inputs (no weights) that `node` was made from."""
        return self._inputs_behind[node]

    def conditioning_behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """Those of the inputs behind `node` that can carry a conditioning: floating, at least [B, L, D]."""
        return frozenset(source for source in self.inputs_behind(node) if self.is_sequence(source))

    def latent_inputs(self, hidden: fx.Node | None) -> frozenset[fx.Node]:
        """Inputs that change at every step: those that the hidden stream starts from.

        A model may join text and image into one stream before its first block. Then they are those of them that are
        shaped like something the model returns, or (image-to-video: extra channels) not named like a conditioning.
        """
        behind = self.conditioning_behind(hidden) if hidden is not None else frozenset()
        alike = behind & self.like_outputs
        return alike or frozenset(node for node in behind if not is_named_conditioning(node))

    @cached_property
    def like_outputs(self) -> frozenset[fx.Node]:
        """The model's inputs that have the shape of something it returns."""
        output = next(node for node in reversed(self.nodes) if node.op == "output")
        shapes = {shape_key(node) for node in output.all_input_nodes if is_tensor(node)}
        inputs = {source for sources in self._inputs_behind.values() for source in sources}
        return frozenset(node for node in inputs if shape_key(node) in shapes and self.is_sequence(node))

    def is_sequence(self, node: fx.Node) -> bool:
        """Whether the node is a floating tensor of at least three dimensions, as [B, L, D]."""
        value = value_of(node)
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def is_named_conditioning(node: fx.Node) -> bool:
    return is_conditioning_name(base_name(node))


def is_conditioning_name(name: str) -> bool:
    return _CONDITIONING_NAME.search(name) is not None


def is_weight(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or a buffer of the model, not something that a caller passed."""
    info = node.meta.get("cachedit_input")
    return info is not None and info.is_weight
