"""Writes a readable diff of a graph before and after the rewrite, with one line per block."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport
from cachedit_fx.inspect.explanation.listing import Listing

INDENT = "    "


def unified_diff(report: GraphReport, graphs: Mapping[str, fx.GraphModule], expand: Sequence[str] | bool = ()) -> str:
    """Returns a unified diff of the graphs "before" and "after"; empty if the graph is not cached.

    Lines that differ only in their indentation are the same; they are shown as they are after the rewrite.

    Args:
        report: The report of the graph.
        graphs: The graphs by the names that `Explanation.graph` takes.
        expand: The paths of the blocks whose nodes are shown; True for all blocks.

    Raises:
        ConfigError: `expand` names a block that the graph does not have.
    """
    before, after = side_by_side(report, graphs, expand)
    if before == after:
        return ""
    context = len(before) if expand else 3  # Expanded blocks are shown whether they changed or not.
    matcher = difflib.SequenceMatcher(None, bare(before), bare(after), autojunk=False)
    lines = ["--- before", "+++ after"]
    for group in matcher.get_grouped_opcodes(context):
        (_, i, _, j, _), (_, _, i_end, _, j_end) = group[0], group[-1]
        lines.append(f"@@ -{i + 1},{i_end - i} +{j + 1},{j_end - j} @@")
        for kind, a, a_end, b, b_end in group:
            if kind == "equal":
                lines += [f" {line}" for line in after[b:b_end]]
            else:
                lines += [f"-{line}" for line in before[a:a_end]]
                lines += [f"+{line}" for line in after[b:b_end]]
    return "\n".join(lines)


def bare(lines: Sequence[str]) -> list[str]:
    """Returns lines without their indentation."""
    return [line.lstrip() for line in lines]


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
    before = Listing.of_captured(graphs["before"])
    lines = list(writer.lines(before))
    return lines, list(writer.lines(Listing.of_cached(graphs["after"], before))) if "after" in graphs else lines


class _Writer:
    """Writes a listing as lines, with one line for all statements of a block that is not shown."""

    def __init__(self, blocks: Sequence[BlockReport], shown: set[str]) -> None:
        self.shown = shown
        lines = [(line.partition("  # ")[0], block) for block in blocks for line in block.code.splitlines()]
        self.block_of = {line.partition(" = ")[0]: block for line, block in lines if " = " in line}
        self.num_lines = {block.number: 0 for block in blocks}
        for block in self.block_of.values():
            self.num_lines[block.number] += 1

    def lines(self, listing: Listing) -> Iterator[str]:
        """Yields the lines of a listing."""
        places: dict[tuple[int, int], list[str]] = {}  # The names that a part of a graph assigns of each block.
        for line in listing.lines:
            block = self._block_of(line.name) if line.is_captured else None
            if block is not None:
                places.setdefault((line.segment, block.number), []).append(line.name)
        for line in listing.lines:
            block = self._block_of(line.name) if line.is_captured else None
            if block is None:
                yield INDENT * line.depth + line.text
            elif places[line.segment, block.number][0] == line.name:
                yield INDENT * line.depth + self._block_line(block, places[line.segment, block.number])

    def _block_of(self, name: str) -> BlockReport | None:
        block = self.block_of.get(name)
        return block if block is not None and block.path not in self.shown else None

    def _block_line(self, block: BlockReport, names: Sequence[str]) -> str:
        """Returns the line of a block of which a part of a graph assigns `names`: all, unless some are deferred."""
        if len(names) == self.num_lines[block.number]:
            return block_line(block)
        here = set(names)
        makes = tuple(name for name in block.makes if name in here)
        return f"{_call(block, makes)}, {len(names)} of them here"


def block_line(block: BlockReport) -> str:
    """Returns the line of a block that is not expanded."""
    return _call(block, block.makes)


def _call(block: BlockReport, makes: Sequence[str]) -> str:
    made = ", ".join(makes) or "..."
    return f"{made} = {block.path}({', '.join(block.reads)})  # {block.cls}, {block.num_nodes} nodes"
