"""What the passes found out about a graph before it is rewritten, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.mismatch import Match
from cachedit_fx.patterns.nodes import base_name


@dataclass(frozen=True, slots=True)
class Plan:
    """All that was found out about a graph, before it is rewritten.

    Attributes:
        gm: The graph, sizes hoisted, its nodes tagged with the number of their block.
        chain: One match per block list, in execution order.
        timestep, conditioning: The placeholders that tell where in which generation a call stands.
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
