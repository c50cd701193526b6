"""A piece: a graph that is compiled once, and the places that call it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from cachedit_fx.patterns.nodes import value_of


@dataclass(slots=True)
class Piece:
    """A graph that is compiled once, and the places that call it.

    Attributes:
        calls: (segment, name of the submodule) of every call. The compiled piece replaces all of these submodules.
        blocks: Numbers in the chain of the blocks that share the piece; empty for work that belongs to no block.
    """

    gm: fx.GraphModule
    calls: list[tuple[fx.GraphModule, str]]
    blocks: list[int] = field(default_factory=list)

    @property
    def example_inputs(self) -> list[Any]:
        """The inputs to compile it with: those of Dynamo, and fake tensors for the values between pieces."""
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        return [node.meta.get("cachedit_example", value_of(node)) for node in placeholders]
