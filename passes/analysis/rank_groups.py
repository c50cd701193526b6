"""Finds the process groups over which regions communicate. Ranks that are in one of them must decide alike.

Sequence and tensor parallelism communicate in every block. If one rank ran the blocks of a region and another one
reused what they added, the first one would wait for the second one without end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from cachedit_fx.passes.region import RankGroup, Region


def find_rank_groups(regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions, each with the process groups over which any of them communicates."""
    nodes = (node for region in regions for node in (*region.deferred, *region.nodes))
    found = {name: ranks for node in nodes for name, ranks in _groups_of(node)}
    groups = _largest(RankGroup(name, ranks) for name, ranks in found.items())
    return tuple(replace(region, groups=groups) for region in regions) if groups else tuple(regions)


def _groups_of(node: fx.Node) -> list[tuple[str, tuple[int, ...]]]:
    """The groups of a node, and of the graphs that it calls."""
    groups = [*node.meta.get("cachedit_groups", {}).items()]
    owner = node.graph.owning_module
    for arg in node.all_input_nodes if owner is not None else ():
        inner = getattr(owner, str(arg.target), None) if arg.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            groups += [found for called in inner.graph.nodes for found in _groups_of(called)]
    return groups


def _largest(groups: Iterable[RankGroup]) -> tuple[RankGroup, ...]:
    """The groups of several ranks, without those whose ranks are all in another one.

    Their order is that of the graph, which is the same on all ranks. The names of the groups may differ.
    """
    found: list[RankGroup] = []
    for group in sorted(groups, key=lambda group: -len(group.ranks)):
        if len(group.ranks) > 1 and not any({*group.ranks} <= {*other.ranks} for other in found):
            found.append(group)
    return tuple(found)
