"""What blocks of a chain are coloured by: the compiled piece that they share, or their class where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachedit_fx.inspect.explanation.data import BlockReport

# After Okabe and Ito, so that the usual kinds of colour blindness tell them apart; black text is legible on all.
COLOURS = ("#56b4e9", "#e69f00", "#2fae82", "#d98cb3", "#f0e442", "#a3b3f2", "#e8804a", "#b4b4b4")


@dataclass(frozen=True, slots=True)
class Kind:
    """Blocks that look alike.

    Attributes:
        index: From 0, in the order in which the chain comes by them.
        short: What is written into a narrow block.
        name: What the legend says.
        count: Blocks of this kind.
    """

    index: int
    short: str
    name: str
    count: int

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def is_striped(self) -> bool:
        """Whether the colour was taken before, so that stripes have to tell the two apart."""
        return self.index >= len(COLOURS)


def kinds_of(blocks: Sequence[BlockReport]) -> tuple[list[Kind], list[int]]:
    """The kinds in the order of the chain, and for every block the index of its kind."""
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
