"""The results of the analysis of a graph, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.mismatch import Match
from cachedit_fx.patterns.nodes import base_name


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rewrite of a graph needs to know about it.

    Attributes:
        gm: The analyzed graph. The metadata of every node of a block contains the number of the block.
        chain: One match per block list, in execution order.
        timestep, conditioning: The placeholders that identify the step and the generation of a call; None if the graph
            has no such input.
    """

    gm: fx.GraphModule
    program: Program
    chain: tuple[Match, ...]
    regions: tuple[Region, ...]
    timestep: fx.Node | None
    conditioning: fx.Node | None

    def __str__(self) -> str:
        lists = " -> ".join(
            f"{' and '.join((m.blocks.path, *m.blocks.alternates))} ({len(m.blocks.blocks)} blocks, {m.label})"
            for m in self.chain
        )
        regions = ", ".join(region.name for region in self.regions)
        names = [base_name(node) if node is not None else "none" for node in (self.timestep, self.conditioning)]
        return f"{lists}; region {regions}; timestep {names[0]}, conditioning {names[1]}"
