"""Lists the statements of a captured graph and of a cached graph, as one program of Python each.

In a cached graph, the statements of the segments are in the places of their calls, and every value has one name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.inspect.explanation.graphs import input_names, statements
from cachedit_fx.passes.transforms.insert_conditionals import compute_or_reuse


@dataclass(frozen=True, slots=True)
class Line:
    """A statement.

    Attributes:
        text: The statement, without indentation.
        name: The name that it assigns; empty if it assigns none.
        segment: The number of the segment that it is in, from 0.
        depth: 1 in a branch of a conditional, else 0.
        is_captured: Whether it is a statement of the captured graph.
    """

    text: str
    name: str = ""
    segment: int = 0
    depth: int = 0
    is_captured: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The statements of a graph."""

    lines: tuple[Line, ...]

    @classmethod
    def of_captured(cls, gm: fx.GraphModule) -> Listing:
        """Returns the statements of a captured graph."""
        text = statements(gm.graph)
        lines = [Line(text[node.name], node.name, is_captured=True) for node in _nodes(gm.graph) if node.name in text]
        output = gm.graph.output_node()
        return cls((*lines, Line(f"return {output.args[0]}")))

    @classmethod
    def of_cached(cls, gm: fx.GraphModule, captured: Listing) -> Listing:
        """Returns the statements of a cached graph.

        Args:
            gm: The cached graph.
            captured: The statements of the graph that it was made from. They keep their names.
        """
        return cls(tuple(_CachedLines(gm, captured).lines()))


def _nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output"))


class _CachedLines:
    """Writes a cached graph.

    Attributes:
        names: The names of the values of the outer graph.
    """

    def __init__(self, gm: fx.GraphModule, captured: Listing) -> None:
        self.gm = gm
        self.captured = {line.name: line.text for line in captured.lines if line.name}
        self.taken = {*self.captured, *(node.name for node in gm.graph.find_nodes(op="placeholder"))}
        self.inputs = input_names(gm.graph, self.captured)
        self.names: dict[fx.Node, str] = {}
        self.results: dict[fx.Node, list[str]] = {}  # The names of what a call of a segment returns.
        self.segment = 0

    def lines(self) -> Iterator[Line]:
        """Yields all statements."""
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = node.name
            elif node.op == "call_module":
                part = self._part(node)
                self.results[node] = self._results(part, names := self._segment_names(part, node.args))
                yield from self._segment(part, names, depth=0)
            elif node.target is compute_or_reuse:
                yield from self._conditional(node)
            elif node.target is operator.getitem and node.args[0] in self.results:
                self.names[node] = self.results[node.args[0]][node.args[1]]
            elif node.op == "call_method":
                yield self._call(node)
            elif node.op == "output":
                yield Line(f"return {self._text(node.args[0])}", segment=self.segment)

    def _part(self, node: fx.Node) -> fx.GraphModule:
        part = self.gm.get_submodule(str(node.target))
        assert isinstance(part, fx.GraphModule)
        return part

    def _call(self, node: fx.Node) -> Line:
        """Returns the statement of a call of the state of the step."""
        text = f"{node.args[0]}.{node.target}({', '.join(map(self._text, node.args[1:]))})"
        if node.target in ("update", "observe"):
            return Line(text, segment=self.segment)
        items = sorted((user.args[1], user) for user in node.users if user.target is operator.getitem)
        if node.target == "cached" and items:
            held = self.results[node] = [self._fresh(f"cached_{i}") for i, _ in items]
            targets = ", ".join(held) if len(held) > 1 else f"({held[0]},)"
            return Line(f"{targets} = {text}", segment=self.segment)
        self.names[node] = self._fresh("probe_before" if node.target == "before" else node.name)
        return Line(f"{self.names[node]} = {text}", self.names[node], self.segment)

    def _conditional(self, node: fx.Node) -> Iterator[Line]:
        """Yields the statements of both branches. They assign the same names."""
        args: Any = node.args
        pred, compute, reuse, operands = args
        branches = [self._part(branch) for branch in (compute, reuse)]
        names = self._segment_names(branches[0], operands)
        self._name_residuals(branches[0], names)
        self.results[node] = results = self._results(branches[0], names)
        yield Line(f"if {self._text(pred)}:  # {compute}", segment=self.segment)
        yield from self._segment(branches[0], names, depth=1)
        yield Line(f"else:  # {reuse}", segment=self.segment)
        reused, more = self._segment_names(branches[1], operands), []
        outputs = _outputs(branches[1])
        for result, output in zip(results, outputs, strict=True):
            if output.op != "placeholder" and outputs.index(output) == results.index(result):
                reused[output] = result
                if _is_copy(output) and output.all_input_nodes[0].op != "placeholder":
                    reused[output.all_input_nodes[0]] = result
            else:
                more.append((result, output))
        yield from self._segment(branches[1], reused, depth=1)
        for result, output in more:
            if result != reused[output]:
                yield Line(f"{result} = {reused[output]}", result, self.segment, 1)

    def _name_residuals(self, branch: fx.GraphModule, names: dict[fx.Node, str]) -> None:
        """Gives the values to cache a name that says what they are."""
        outputs = _outputs(branch)
        for output in outputs[len(outputs) // 2 :]:
            if output.meta.get("cachedit_probe"):
                self.taken.discard(names[output])
                names[output] = self._fresh("residual" if output.target is torch.sub else "value")

    def _segment_names(self, part: fx.GraphModule, arguments: Any) -> dict[fx.Node, str]:
        """Returns the names of the nodes of a segment: for its placeholders, the names of what is passed."""
        inputs = part.graph.find_nodes(op="placeholder")
        names = {given: self.names.get(value, str(value)) for given, value in zip(inputs, arguments, strict=True)}
        self.segment += 1
        text = statements(part.graph, self.captured)
        for node in _nodes(part.graph):
            if self._is_captured(node, text):
                names[node] = node.name
            elif _is_copy(node):
                names[node] = names[node.args[0]]
            else:
                names[node] = self._fresh("probe_vector" if _is_probe_vector(node) else node.name)
        return names

    def _is_captured(self, node: fx.Node, text: Mapping[str, str]) -> bool:
        """Whether a node is one of the captured graph. A node that was added may have the name of another one."""
        return bool(node.meta.get("nn_module_stack")) or (
            node.name in self.captured and text.get(node.name) == self.captured[node.name]
        )

    def _segment(self, part: fx.GraphModule, names: Mapping[fx.Node, str], *, depth: int) -> Iterator[Line]:
        original = statements(part.graph, self.captured)
        text = statements(_renamed(part.graph, names), self.captured)
        for node in _nodes(part.graph):
            name = names[node]
            if node.name not in original:
                continue
            is_captured = self._is_captured(node, original)
            found = self.captured.get(name) if is_captured else text.get(name)
            if _is_copy(node):
                found = f"{name} = {name}.contiguous()"
            if found is not None:
                yield Line(found, name, self.segment, depth, is_captured)

    def _results(self, part: fx.GraphModule, names: Mapping[fx.Node, str]) -> list[str]:
        return [names.get(output, str(output)) for output in _outputs(part)]

    def _fresh(self, name: str) -> str:
        """Returns a name that no other value has, and takes it."""
        base, number, found = name.rstrip("0123456789").rstrip("_") or name, 0, name
        while found in self.taken:
            number += 1
            found = f"{base}_{number}"
        self.taken.add(found)
        return found

    def _text(self, argument: Any) -> str:
        if isinstance(argument, tuple | list):
            inside = ", ".join(map(self._text, argument))
            return f"({inside}{',' * (len(argument) == 1)})"
        if not isinstance(argument, fx.Node):
            return repr(argument)
        name = self.names.get(argument, argument.name)
        return self.inputs.get(name, name)


def _outputs(part: fx.GraphModule) -> Sequence[fx.Node]:
    outputs: Sequence[fx.Node] = part.graph.output_node().args[0]  # type: ignore[assignment]
    return outputs


def _is_copy(node: fx.Node) -> bool:
    """Whether a node was added to make a live-out contiguous."""
    return bool(node.meta.get("cachedit_probe")) and node.target == "contiguous"


def _is_probe_vector(node: fx.Node) -> bool:
    return bool(node.meta.get("cachedit_probe")) and node.target in (torch.stack, torch.cat)


def _renamed(graph: fx.Graph, names: Mapping[fx.Node, str]) -> fx.Graph:
    """Returns a copy of a graph whose nodes have other names. Its output is empty."""
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
        name = names.get(node, node.name)
        nodes[node] = copied.create_node(node.op, node.target, args, kwargs, name=name)
        nodes[node].meta = {key: value for key, value in node.meta.items() if key == "cachedit_input"}
    copied.output(())
    return copied
