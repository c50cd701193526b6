"""Writes a readable diff of a graph before and after the rewrite, with one line per block."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport
from cachedit_fx.inspect.explanation.graphs import statements
from cachedit_fx.passes.transforms.insert_conditionals import compute_or_reuse


def unified_diff(report: GraphReport, graphs: Mapping[str, fx.GraphModule], expand: Sequence[str] | bool = ()) -> str:
    """Returns a unified diff of the graphs "before" and "after"; empty if the graph is not cached.

    Args:
        report: The report of the graph.
        graphs: The graphs by the names that `Explanation.graph` takes.
        expand: The paths of the blocks whose nodes are shown; True for all blocks.

    Raises:
        ConfigError: `expand` names a block that the graph does not have.
    """
    before, after = side_by_side(report, graphs, expand)
    context = len(before) if expand else 3  # Expanded blocks are shown whether they changed or not.
    return "\n".join(difflib.unified_diff(before, after, "before", "after", lineterm="", n=context))


def side_by_side(
    report: GraphReport, graphs: Mapping[str, fx.GraphModule], expand: Sequence[str] | bool = ()
) -> tuple[list[str], list[str]]:
    """Returns the lines of the captured graph and those of the cached graph; equal if the graph is not cached.

    Args:
        report: The report of the graph.
        graphs: The graphs by the names that `Explanation.graph` takes.
        expand: The paths of the blocks whose nodes are shown; True for all blocks.

    Raises:
        ConfigError: `expand` names a block that the graph does not have.
    """
    paths = [block.path for block in report.blocks]
    shown = set(paths) if expand is True else set(expand or ())
    unknown = sorted(shown - set(paths))
    if unknown:
        near = difflib.get_close_matches(unknown[0], paths, n=3, cutoff=0.0)
        raise ConfigError(
            f"cachedit_fx: expand must name blocks of this graph, such as {', '.join(near)}, got {unknown[0]!r}; "
            f"there are {len(paths)} of them, in explanation.graphs[i].blocks"
        )
    writer = _Writer(report.blocks, shown)
    before = writer.lines(graphs["before"])
    return before, writer.rewritten_lines(graphs["after"]) if "after" in graphs else before


class _Writer:
    """Writes graphs as lines.

    The nodes of a block are identified by their names, which the rewrite does not change. A node that the rewrite adds
    to one segment may have the name of a block's node in another segment. Such a node has neither a stack of modules
    nor the same statement.
    """

    def __init__(self, blocks: Sequence[BlockReport], shown: set[str]) -> None:
        self.shown = shown
        lines = [(line.partition("  # ")[0], block) for block in blocks for line in block.code.splitlines()]
        self.statements = {line for line, _ in lines}
        self.block_of = {line.partition(" = ")[0]: block for line, block in lines if " = " in line}

    def lines(self, gm: fx.GraphModule, *, returns: bool = True) -> list[str]:
        """Returns the lines of a graph, one per node or block."""
        text, found = statements(gm.graph), []
        written: set[int] = set()
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            block = self.block_of.get(node.name)
            is_own = node.meta.get("nn_module_stack") or text.get(node.name) in self.statements
            if block is not None and is_own and block.path not in self.shown:
                if block.number not in written:
                    written.add(block.number)
                    found.append(block_line(block) + self._part_of(block, text))
            elif node.op == "output":
                found += [f"return {node.args[0]}"] if returns else []
            elif node.name in text:
                found.append(text[node.name])
        return found

    def _part_of(self, block: BlockReport, text: Mapping[str, str]) -> str:
        """Returns a remark if the segment contains only a part of the block, because the rest was deferred."""
        names = [name for name, other in self.block_of.items() if other is block]
        here = sum(name in text for name in names)
        return "" if here == len(names) else f", {here} of them here"

    def rewritten_lines(self, after: fx.GraphModule) -> list[str]:
        """Returns the lines of the cached graph, with each segment in place of its call."""
        return list(self._rewritten_lines(after))

    def _rewritten_lines(self, after: fx.GraphModule) -> Iterator[str]:
        parts = {name: part for name, part in after.named_children() if isinstance(part, fx.GraphModule)}
        called: dict[fx.Node, list[str]] = {}  # The names, in the segment, of what each call returns.
        names: dict[fx.Node, str] = {}
        for node in after.graph.nodes:
            if node.op == "call_module":
                yield from self.lines(parts[str(node.target)], returns=False)
                called[node] = _returned(parts[str(node.target)])
            elif node.target is compute_or_reuse:
                pred, compute, reuse, _ = node.args
                yield f"if {pred}:  # {compute}"
                yield from self.lines(parts[str(compute.target)], returns=False)
                yield f"else:  # {reuse}"
                yield from self.lines(parts[str(reuse.target)], returns=False)
                yield "# both"
                called[node] = _returned(parts[str(compute.target)])
            elif node.target is operator.getitem and node.args[0] in called:
                names[node] = called[node.args[0]][node.args[1]]
            elif node.op == "call_method":
                arguments = ", ".join(_text(arg, names) for arg in node.args[1:])
                yield f"{node.name} = {node.args[0]}.{node.target}({arguments})"
            elif node.op == "output":
                yield f"return {_text(node.args[0], names)}"


def _returned(gm: fx.GraphModule) -> list[str]:
    """Returns the names of the nodes that a segment returns."""
    return [str(arg) for arg in gm.graph.output_node().args[0]]  # type: ignore[union-attr]


def _text(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, tuple | list):
        inside = ", ".join(_text(item, names) for item in argument)
        return f"({inside}{',' * (len(argument) == 1)})"
    return names.get(argument, str(argument)) if isinstance(argument, fx.Node) else repr(argument)


def block_line(block: BlockReport) -> str:
    """Returns the line of a block that is not expanded."""
    made = ", ".join(block.makes) or "..."
    return f"{made} = {block.path}({', '.join(block.reads)})  # {block.cls}, {block.num_nodes} nodes"
