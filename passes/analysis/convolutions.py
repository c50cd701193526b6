"""Tells a UNet from a transformer by its structure: by the convolutions of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.join_lists import LEAST_SHARE
from cachedit_fx.passes.analysis.op_tables import CONVOLUTIONS
from cachedit_fx.patterns.nodes import is_tensor, size_key, value_of


@dataclass(frozen=True, slots=True)
class Convolutions:
    """The convolutions of a graph.

    Attributes:
        share: Their share of the FLOPs of the graph, from 0 to 1.
        num_resolutions: The number of different sizes of their outputs, without batch and channels.
    """

    share: float
    num_resolutions: int

    @property
    def is_unet(self) -> bool:
        """Whether the graph consists of convolutions at several resolutions.

        A transformer may convolve in its blocks, at one resolution, and in the layers around them, which are a small
        part of it.
        """
        return self.num_resolutions > 1 and self.share >= LEAST_SHARE

    def __str__(self) -> str:
        return f"convolutions at {self.num_resolutions} resolutions, which make up {self.share:.0%} of the FLOPs"


def find_convolutions(program: Program) -> Convolutions:
    """The convolutions of a graph."""
    found = [node for node in program.nodes if node.target in CONVOLUTIONS and is_tensor(node)]
    total = sum(program.flops) or 1
    share = sum(program.flops[program.position[node]] for node in found) / total
    return Convolutions(share, len({tuple(map(size_key, value_of(node).shape[2:])) for node in found}))
