"""Aligns the lines of a graph before and after the rewrite in rows."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport
from cachedit_fx.inspect.explanation.diff import INDENT, bare, block_line, side_by_side

_SHOWN = 2  # Number of lines that are shown at both ends of a run of equal lines; the others are collapsed.


@dataclass(frozen=True, slots=True)
class Line:
    """A line of one side.

    Attributes:
        text: The text of the line, without indentation.
        block: The block that the line shows; None for a node.
        depth: 1 inside the branches of a conditional, else 0.
    """

    text: str
    block: BlockReport | None
    depth: int

    @property
    def parts(self) -> tuple[str, str, str]:
        """The text before the path of the block, the path, and the text after it."""
        return self.text.partition(self.block.path) if self.block is not None else (self.text, "", "")


@dataclass(frozen=True, slots=True)
class Row:
    """Two lines that belong together. At least one of them is present.

    Attributes:
        kind: "same", "changed", "removed", "added", or "broken" for the place at which the chain of a graph breaks.
        left: The line before the rewrite.
        right: The line after the rewrite.
    """

    kind: str
    left: Line | None
    right: Line | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows, which are shown or collapsed."""

    rows: tuple[Row, ...]
    is_folded: bool = False

    @property
    def what(self) -> str:
        """What the rows of a collapsed chunk are: "blocks" or "nodes"."""
        return "blocks" if _same(self.rows[0]) == "block" else "nodes"


def chunks_of(report: GraphReport, graphs: Mapping[str, fx.GraphModule]) -> list[Chunk]:
    """Returns all rows of a graph, with long runs of equal rows collapsed."""
    before, after = side_by_side(report, graphs)
    block_of = {block_line(block): block for block in report.blocks}
    chunks = []
    rows = _with_break(report, _rows(_lines(before, block_of), _lines(after, block_of)))
    for same, run in itertools.groupby(rows, key=_same):
        found = tuple(run)
        if same and len(found) > 2 * _SHOWN + 4:
            head, middle, tail = found[:_SHOWN], found[_SHOWN:-_SHOWN], found[-_SHOWN:]
            chunks += [Chunk(head), Chunk(middle, is_folded=True), Chunk(tail)]
        else:
            chunks.append(Chunk(found))
    return chunks


def _with_break(report: GraphReport, rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the rows, with one for the place at which the chain breaks."""
    is_marked = report.broken_at is None
    broken = Line(f"✗ {report.broken}", None, 0)
    last = -1
    for row in rows:
        block = row.left.block if row.left is not None else None
        is_behind = block is None or block.number >= (report.broken_at or 0)
        if not is_marked and is_behind and last + 1 == report.broken_at:
            is_marked = True
            yield Row("broken", broken, broken)
        last = block.number if block is not None else last
        yield row


def _same(row: Row) -> str:
    """Returns "block" or "node" for a row that is the same on both sides, else an empty string."""
    if row.kind != "same" or row.left is None:
        return ""
    return "node" if row.left.block is None else "block"


def _lines(texts: Sequence[str], block_of: Mapping[str, BlockReport]) -> list[Line]:
    lines = zip(texts, bare(texts), strict=True)
    return [Line(found, block_of.get(found), (len(text) - len(found)) // len(INDENT)) for text, found in lines]


def _rows(left: Sequence[Line], right: Sequence[Line]) -> Iterator[Row]:
    matcher = difflib.SequenceMatcher(None, [one.text for one in left], [one.text for one in right], autojunk=False)
    for what, i, i_end, j, j_end in matcher.get_opcodes():
        for one, other in itertools.zip_longest(left[i:i_end], right[j:j_end]):
            kind = "same" if what == "equal" else "added" if one is None else "removed" if other is None else "changed"
            yield Row(kind, one, other)
