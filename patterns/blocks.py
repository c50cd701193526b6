"""What a template is matched against: the blocks that were found in a graph and the streams between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True, slots=True)
class Block:
    """The nodes that one transformer-block module call left in the graph.

    Attributes:
        path: Path of the module from the model, as in `transformer_blocks.3`.
        cls: The block's class, where Dynamo kept it.
        start: Position of its first node in program order; `end` is one past its last node.
        span_end: Where the next block starts (or `end`, for the last): work between blocks belongs to the one before.
    """

    path: str
    cls: type | None
    start: int
    end: int
    span_end: int


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of one module list, in execution order, and the streams at the places between them.

    Attributes:
        path: Path of the list, as in `transformer_blocks`.
        blocks: At least two.
        boundaries: For i = 0..n the streams just before block i (n: after the last), role -> node. Shorter than n + 1
            where the streams were lost; then `broken` says at which node and why.
        contexts: Invariants that every block reads and that look like a conditioning sequence: floating, at least
            [B, L, D], made from a conditioning input.
        emitted: What a block hands out beside its streams and nobody carries on, seen at the end of the list.
        flops: Estimate over all blocks.
        alternates: Path of the list whose blocks take turns with these, if one does; a block is then one of each.
    """

    path: str
    blocks: tuple[Block, ...]
    boundaries: tuple[Mapping[str, fx.Node], ...]
    contexts: tuple[fx.Node, ...] = ()
    emitted: tuple[fx.Node, ...] = ()
    broken: str = ""
    flops: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # role -> the name that the model's code uses
    alternates: tuple[str, ...] = ()

    @property
    def has_its_first(self) -> bool:
        """Whether the first block here is the first of its list: block 0, or 1 of modules under numbered names."""
        name = self.blocks[0].path.rpartition(".")[2]
        number = name[len(name.rstrip("0123456789")) :]
        return not number or int(number) <= (0 if name.isdigit() else 1)

    @property
    def has_stream(self) -> bool:
        """Whether at least one stream runs over every boundary."""
        return len(self.boundaries) == len(self.blocks) + 1
