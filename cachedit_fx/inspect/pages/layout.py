"""Computes the positions of the parts of a chain in its drawing, in pixels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport

MARGIN = 12.0
END = 58.0  # Width of the boxes before and after the chain.
CONDITIONAL = 112.0  # Width of a conditional before a region.
JOIN = 52.0  # Width of the place after a region where the two branches meet.
BLOCK_HEIGHT = 74.0


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
        boxes: The boxes of the blocks.
        bands: The bands of blocks.
    """

    width: float
    is_wide: bool
    head: Box
    tail: Box
    boxes: tuple[Box, ...]
    bands: tuple[Band, ...]


def lay_out(graph: GraphReport) -> Layout:
    """Returns the layout of a graph that has blocks."""
    count = len(graph.blocks)
    block, gap = (84.0, 20.0) if count <= 8 else (56.0, 18.0) if count <= 16 else (30.0, 9.0)
    x = MARGIN
    head = Box(x, END)
    x = head.right
    boxes: list[Box] = []
    bands: list[Band] = []
    is_after_region = False
    for (part, _), run in runs_of(graph.blocks):
        is_region = run[0].region is not None and graph.is_cached
        conditional = x + CONDITIONAL / 2 if is_region else None
        x += CONDITIONAL if is_region else 22 if is_after_region or not boxes else 30
        start = x
        for _ in run:
            boxes.append(Box(x, block))
            x += block + gap
        x -= gap
        join = x + JOIN / 2 if is_region else None
        bands.append(Band(part, run[0].region, run[0].number, run[-1].number + 1, conditional, join, start, x))
        x += JOIN if is_region else 0
        is_after_region = is_region
    x += 10 if is_after_region else 26
    tail = Box(x, END)
    return Layout(tail.right + MARGIN, block >= 56, head, tail, tuple(boxes), tuple(bands))


def runs_of(blocks: tuple[BlockReport, ...]) -> list[tuple[tuple[str, int | None], list[BlockReport]]]:
    """Neighbouring blocks of one part and region: (part, region) and the blocks."""
    grouped = itertools.groupby(blocks, key=lambda block: (block.part, block.region))
    return [(key, list(run)) for key, run in grouped]
