"""Computes the positions of the parts of a chain in its drawing, in pixels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport
from cachedit_fx.inspect.pages.pieces import kinds_of

MARGIN = 12.0
END = 58.0  # Width of the boxes before and after the chain.
CONDITIONAL = 118.0  # Width of a conditional before a region.
JOIN = 52.0  # Width of the place after a region where the two branches meet.
BREAK = 76.0  # Width of the place at which a stream ends.
BLOCK_HEIGHT = 80.0
# The largest number of boxes -> the width of a box, and the gap behind it.
WIDTHS = ((5, 124.0, 26.0), (8, 74.0, 18.0), (12, 46.0, 12.0), (math.inf, 34.0, 9.0))
STACK = 8.0  # Additional width of a stack of equal blocks.
UNFOLDED = 8  # A chain of at most so many blocks shows all of them.
LEAST_FOLDED = 4  # The least number of equal blocks in a row that are drawn as one.


@dataclass(frozen=True, slots=True)
class Box:
    """A block, or an end of the chain."""

    x: float
    width: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True, slots=True)
class Cell:
    """What one box shows: a block, or several equal ones.

    Attributes:
        first: The number of its first block.
        last: The number of the first block after it.
        box: The box.
    """

    first: int
    last: int
    box: Box

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Band:
    """Consecutive blocks of one part or region.

    Attributes:
        part: As in `BlockReport`.
        region: As in `BlockReport`.
        first: The number of its first block.
        last: The number of the first block after it.
        conditional: The middle of the conditional before it; None if there is none.
        join: The middle of the place after it where the two branches meet; None if there is none.
        x: Its left end.
        right: Its right end.
    """

    part: str
    region: int | None
    first: int
    last: int
    conditional: float | None
    join: float | None
    x: float
    right: float


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of the whole drawing.

    Attributes:
        width: The width of the drawing.
        is_wide: Whether the blocks have room for words.
        head: The box before the chain.
        tail: The box after the chain.
        cells: The boxes of the blocks, in the order of the chain.
        bands: The bands of blocks.
        broken: The middle of the place at which a stream ends; None if none does.
    """

    width: float
    is_wide: bool
    head: Box
    tail: Box
    cells: tuple[Cell, ...]
    bands: tuple[Band, ...]
    broken: float | None

    @property
    def boxes(self) -> list[Box]:
        """The box of every block, by its number."""
        return [cell.box for cell in self.cells for _ in range(cell.count)]


def lay_out(graph: GraphReport) -> Layout:
    """Returns the layout of a graph that has blocks."""
    spans = spans_of(graph)
    block, gap = next((width, gap) for most, width, gap in WIDTHS if len(spans) <= most)
    x = MARGIN
    head = Box(x, END)
    x = head.right
    cells: list[Cell] = []
    bands: list[Band] = []
    broken: float | None = None
    is_after_region = False
    for (part, _), run in runs_of(graph.blocks):
        is_region = run[0].region is not None and graph.is_cached
        conditional = x + CONDITIONAL / 2 if is_region else None
        x += CONDITIONAL if is_region else 22 if is_after_region or not cells else 30
        start = x
        first, last = run[0].number, run[-1].number + 1
        for begin, end in (span for span in spans if first <= span[0] < last):
            if begin == graph.broken_at and cells:
                broken = x - gap / 2 + BREAK / 2
                x += BREAK
            cells.append(Cell(begin, end, Box(x, block)))
            x += block + gap + (STACK if end - begin > 1 else 0)
        x -= gap
        join = x + JOIN / 2 if is_region else None
        bands.append(Band(part, run[0].region, first, last, conditional, join, start, x))
        x += JOIN if is_region else 0
        is_after_region = is_region
    if graph.broken_at is not None and broken is None:
        broken = x + BREAK / 2
        x += BREAK
    x += 10 if is_after_region else 26
    tail = Box(x, END)
    return Layout(tail.right + MARGIN, block >= 74, head, tail, tuple(cells), tuple(bands), broken)


def spans_of(graph: GraphReport) -> list[tuple[int, int]]:
    """Returns the blocks that one box shows: the number of the first one, and of the first one after it."""
    folds = len(graph.blocks) > UNFOLDED
    kind_of = kinds_of(graph.blocks)[1]

    def key(block: BlockReport) -> tuple[object, ...]:
        is_behind = graph.broken_at is not None and block.number >= graph.broken_at
        return block.path.rpartition(".")[0], block.part, block.region, kind_of[block.number], is_behind

    spans: list[tuple[int, int]] = []
    for _, run in itertools.groupby(graph.blocks, key=key):
        numbers = [block.number for block in run]
        if folds and len(numbers) >= LEAST_FOLDED:
            spans.append((numbers[0], numbers[-1] + 1))
        else:
            spans += [(number, number + 1) for number in numbers]
    return spans


def runs_of(blocks: tuple[BlockReport, ...]) -> list[tuple[tuple[str, int | None], list[BlockReport]]]:
    """Neighbouring blocks of one part and region: (part, region) and the blocks."""
    grouped = itertools.groupby(blocks, key=lambda block: (block.part, block.region))
    return [(key, list(run)) for key, run in grouped]
