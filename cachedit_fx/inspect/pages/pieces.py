"""Groups the blocks of a chain into kinds of one color: blocks of one compiled piece, or else of one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachedit_fx.inspect.explanation.data import BlockReport

# After Okabe and Ito: distinguishable with the usual kinds of color blindness. Black text is legible on all of them.
COLORS = ("#56b4e9", "#e69f00", "#2fae82", "#d98cb3", "#f0e442", "#a3b3f2", "#e8804a", "#b4b4b4")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of blocks, which have one color.

    Attributes:
        index: Its number, from 0, in the order of the chain.
        short: Its short name, for narrow blocks.
        name: Its name in the legend.
        count: The number of blocks of this kind.
    """

    index: int
    short: str
    name: str
    count: int

    @property
    def color(self) -> str:
        return COLORS[self.index % len(COLORS)]

    @property
    def is_striped(self) -> bool:
        """Whether another kind has the same color, so that this one needs stripes."""
        return self.index >= len(COLORS)


def kinds_of(blocks: Sequence[BlockReport]) -> tuple[list[Kind], list[int]]:
    """Returns the kinds in the order of the chain, and the index of the kind of every block."""
    keys = [(block.piece, "" if block.piece is not None else block.cls) for block in blocks]
    order = list(dict.fromkeys(keys))
    kinds = []
    for index, key in enumerate(order):
        piece, cls = key
        names = sorted(
            {block.cls or "block" for block, block_key in zip(blocks, keys, strict=True) if block_key == key}
        )
        short = f"p{piece}" if piece is not None else chr(ord("A") + index % 26)
        name = f"piece {piece}: {', '.join(names)}" if piece is not None else cls or "block"
        kinds.append(Kind(index, short, name, keys.count(key)))
    return kinds, [order.index(key) for key in keys]
