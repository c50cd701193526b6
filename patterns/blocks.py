"""The blocks that were found in a graph, and the streams between them: what templates are matched against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from cachedit_fx.patterns.nodes import dtype_and_shape

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True, slots=True)
class Block:
    """The nodes that one call of a transformer-block module left in the graph.

    Attributes:
        path: Path of the module from the model, for example `transformer_blocks.3`.
        cls: Class of the block; None if Dynamo did not record it.
        start, end: Position of its first node in program order, and one past the position of its last node. Layout
            operations at the beginning of the first block, which cut its inputs, may be left out.
        span_end: Start of the next block, or `end` for the last block. Nodes between two blocks belong to the first.
    """

    path: str
    cls: type | None
    start: int
    end: int
    span_end: int


@dataclass(frozen=True, slots=True)
class StreamChange:
    """The place at which a stream gets another shape, so that the next block does not continue it.

    Attributes:
        boundary: Index of the first boundary without the stream.
        role: Role of the stream.
        before: The stream as it enters the block before this boundary.
        after: The first value with another shape.
        handed_on: The value that the nodes after this boundary read instead of the stream.
        is_between: Whether `after` is computed after the block, by the code that calls the blocks.
    """

    boundary: int
    role: str
    before: fx.Node
    after: fx.Node
    handed_on: fx.Node
    is_between: bool

    def __str__(self) -> str:
        place = f"between block {self.boundary - 1} and block {self.boundary}"
        shapes = f"from {dtype_and_shape(self.before)} to {dtype_and_shape(self.handed_on)}"
        return f"{self.role} changes {shapes} {place if self.is_between else f'in block {self.boundary - 1}'}"


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of one module list, in execution order, and the streams between them.

    Attributes:
        path: Path of the list, for example `transformer_blocks`.
        blocks: At least two.
        boundaries: For i in 0..n the streams before block i (for n: after the last block), as role -> node. It has
            fewer than n + 1 entries if no stream continues at some boundary (`lost_at`).
        contexts: Invariants that every block reads and that may be a conditioning sequence: floating-point tensors of
            at least three dimensions ([B, L, D]) that are computed from a conditioning input.
        emitted: Outputs of the last block that are used after the list and are not streams.
        flops: Estimate for all blocks together.
        labels: Role of a stream -> its name in the model's code.
        alternates: Path of the list whose blocks alternate with the blocks of this list, if there is one. A `Block`
            then consists of one block of each list.
        change: The first place at which a stream gets another shape; None if there is none, or if it is not known.
    """

    path: str
    blocks: tuple[Block, ...]
    boundaries: tuple[Mapping[str, fx.Node], ...]
    contexts: tuple[fx.Node, ...] = ()
    emitted: tuple[fx.Node, ...] = ()
    flops: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    alternates: tuple[str, ...] = ()
    change: StreamChange | None = None

    @property
    def has_its_first(self) -> bool:
        """Whether the first block is the first one of its list: number 0, or 1 for names such as `layer1`."""
        name = self.blocks[0].path.rpartition(".")[2]
        number = name[len(name.rstrip("0123456789")) :]
        return not number or int(number) <= (0 if name.isdigit() else 1)

    @property
    def has_stream(self) -> bool:
        """Whether at least one stream continues over every boundary."""
        return self.lost_at is None

    @property
    def lost_at(self) -> int | None:
        """Index of the first boundary at which no stream continues; None if there is none."""
        count = len(self.boundaries)
        return count if count <= len(self.blocks) else None

    @property
    def loss(self) -> str:
        """Why no stream continues to the end, for messages; empty if one does."""
        if self.lost_at is None:
            return ""
        change = self.change if self.change is not None and self.change.boundary <= self.lost_at else None
        if change is not None and (change.is_between or change.boundary < self.lost_at):
            return str(change)
        loss = f"no output of block {self.lost_at - 1} has the same shape as any of its inputs"
        return f"{loss}; {change}" if change is not None else loss
