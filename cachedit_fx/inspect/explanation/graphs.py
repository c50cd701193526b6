"""Copies graphs for inspection, and writes their nodes as lines of Python."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from cachedit_fx.patterns.nodes import value_of


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph and of the graphs that it calls. It shares the weights, and holds no inputs."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.meta.pop("cachedit_example", None)
        node.meta.pop("grapharg", None)
    copied = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            copied.add_module(name, snapshot(child))
    return copied


def statements(graph: fx.Graph, names: Collection[str] | None = None) -> dict[str, str]:
    """Returns the line of Python for each node, by its name. Weights are given by their paths, arguments by name.

    Args:
        graph: The graph, or a part of one.
        names: The names of the nodes of the whole graph; by default those of `graph`. An argument with one of these
            names is given with `_input` after its name.
    """
    if names is None:
        names = {node.name for node in graph.nodes if node.op != "placeholder"}
    found, paths = {}, input_names(graph, names)
    for line in graph.python_code("self").src.splitlines():
        name, equals, value = line.strip().partition(" = ")
        if equals:
            value = re.sub(r"\b[A-Za-z_]\w*\b", lambda word: paths.get(word[0], word[0]), value.partition(";")[0])
            found[name.partition(":")[0].strip()] = f"{name} = {value}"
    return found


def input_names(graph: fx.Graph, names: Collection[str]) -> dict[str, str]:
    """Returns what stands for the placeholders of a graph, by their names: see `statements`."""
    inputs = {node.name: node.meta.get("cachedit_input") for node in graph.find_nodes(op="placeholder")}
    paths = {name: info for name, info in inputs.items() if info is not None and info.path}
    return {
        name: f"{info.path}_input" if not info.is_weight and info.path in names else info.path
        for name, info in paths.items()
    }


def code_of(nodes: Sequence[fx.Node], lines: dict[str, str]) -> str:
    """Returns the nodes as Python code, one line each, followed by the place in the user's code where it changes."""
    found, last = [], ""
    for node in nodes:
        line = lines.get(node.name)
        if line is None:
            continue
        where = last_frame(node)
        found.append(f"{line}  # {where}" if where and where != last else line)
        last = where or last
    return "\n".join(found)


def last_frame(node: fx.Node) -> str:
    """Returns the place in the user's code, such as `attention.py:123, in forward`; empty if Dynamo stored no stack."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [line.strip() for line in trace if line.strip().startswith("File ")]
    if not frames:
        return ""
    path, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    number, _, function = rest.partition(", in ")
    return f"{path.rpartition('/')[2]}:{number}" + (f", in {function}" if function else "")


def shapes_of(node: fx.Node) -> str:
    """Returns the dtype and shape of a node, such as `float32[2, 16, 32]`; empty if it is not a tensor."""
    value: Any = value_of(node)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
