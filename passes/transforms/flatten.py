"""Turns a cached graph with compiled pieces into three flat functions, for fast dispatch.

    front(step, ...)             -> pred, and the values that are needed after the decision
    reuse(step, values, ...)     -> the outputs of the graph
    compute(step, values, ...)   -> the outputs of the graph

A reused step needs only the arguments of `front` and `reuse`, which include few of the weights of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument, map_arg

from cachedit_fx.passes.transforms.insert_conditionals import compute_or_reuse


@dataclass(frozen=True, slots=True)
class Part:
    """A function of `step`, of values of the previous part, and of the arguments of the graph at `positions`."""

    call: Callable[..., Any]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FlatGraph:
    """The three parts of a cached graph."""

    front: Part
    reuse: Part
    compute: Part


def flatten(gm: fx.GraphModule) -> FlatGraph | None:
    """The parts of a cached graph, which call its compiled pieces; None if it has several conditionals."""
    if sum(node.target is compute_or_reuse for node in gm.graph.nodes) != 1:
        return None
    compute, reuse = _Inlined(gm, takes=1), _Inlined(gm, takes=2)
    if compute.names_before != reuse.names_before:
        return None  # Does not occur, because only nodes after the decision differ.
    needed = sorted(compute.needed_after | reuse.needed_after)
    return FlatGraph(reuse.front(needed), reuse.rest(needed), compute.rest(needed))


class _Inlined:
    """The graph with its segments and one branch inlined: argument number `takes` of the conditional."""

    def __init__(self, gm: fx.GraphModule, *, takes: int) -> None:
        self.graph, self.root, self._takes = fx.Graph(), torch.nn.Module(), takes
        self._names: dict[int, str] = {}
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.inputs = [self.graph.placeholder(f"input_{i}") for i in range(len(placeholders))]
        self.outputs = self._inline(gm, self.inputs)
        self.calls = [node for node in self.graph.nodes if node.op != "placeholder"]
        self._decision = next(i for i, n in enumerate(self.calls) if n.op == "call_method" and n.target == "decide")

    @property
    def before(self) -> list[fx.Node]:
        return self.calls[: self._decision + 1]

    @property
    def after(self) -> list[fx.Node]:
        return self.calls[self._decision + 1 :]

    @property
    def names_before(self) -> list[str]:
        return [node.name for node in self.before]

    @property
    def needed_after(self) -> set[str]:
        """Names of the values that are computed before the decision and read after it."""
        made = set(self.before)
        read = {arg for node in self.after for arg in node.all_input_nodes}
        map_arg(self.outputs, read.add)
        return {node.name for node in read & made}

    def front(self, needed: Sequence[str]) -> Part:
        by_name = {node.name: node for node in self.before}
        return self._part(self.before, [], [self.before[-1], *(by_name[name] for name in needed)], "Front")

    def rest(self, needed: Sequence[str]) -> Part:
        by_name = {node.name: node for node in self.before}
        return self._part(self.after, [by_name[name] for name in needed], self.outputs, "Rest")

    def _part(self, nodes: Sequence[fx.Node], given: Sequence[fx.Node], outputs: Argument, name: str) -> Part:
        graph = fx.Graph()
        read = {arg for node in nodes for arg in node.all_input_nodes}
        map_arg(outputs, read.add)
        used = [(i, node) for i, node in enumerate(self.inputs[1:]) if node in read]
        values = {node: graph.placeholder(node.name) for node in (self.inputs[0], *given, *(n for _, n in used))}
        for node in nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(map_arg(outputs, values.__getitem__))
        module = fx.GraphModule(self.root, graph, class_name=name)
        return Part(module.forward, tuple(i for i, _ in used))

    def _inline(self, gm: fx.GraphModule, arguments: Sequence[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(arguments)
        *nodes, output = gm.graph.nodes
        for node in nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                found = _attribute(gm, str(node.target))
                values[node] = found if isinstance(found, fx.GraphModule) else self._hold("get_attr", found)
            elif node.target is compute_or_reuse:
                branch = values[node.args[self._takes]]
                values[node] = self._inline(branch, _read(node.args[3], values))
            elif node.op == "call_module":
                called = _attribute(gm, str(node.target))
                args = _read(node.args, values)
                if isinstance(called, fx.GraphModule):
                    values[node] = self._inline(called, args)
                else:
                    values[node] = self._hold("call_module", called, args)
            elif isinstance(_first(node, values), tuple):  # getitem of what an inlined segment returns.
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = self.graph.node_copy(node, lambda n: values[n])
        return _read(output.args[0], values)

    def _hold(self, op: str, value: Any, args: tuple[Any, ...] = ()) -> fx.Node:
        name = self._names.setdefault(id(value), f"held_{len(self._names)}")
        self.root.__dict__[name] = value
        return self.graph.create_node(op, name, args)


def _read(arg: Any, values: dict[fx.Node, Any]) -> Any:
    """`arg` with its nodes replaced by their values, which may be tuples."""
    if isinstance(arg, fx.Node):
        return values[arg]
    if isinstance(arg, tuple | list):
        return tuple(_read(part, values) for part in arg)
    return arg


def _first(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    first = node.args[0] if node.args else None
    return values.get(first) if isinstance(first, fx.Node) else None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
