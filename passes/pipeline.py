"""The way of a graph, in order: hoist sizes, locate blocks, join lists, match templates, cut regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from cachedit_fx.config import CacheConfig
from cachedit_fx.passes.cut import Region, cut_regions
from cachedit_fx.passes.dataflow import Program
from cachedit_fx.passes.inputs import find_conditioning, find_timestep
from cachedit_fx.passes.join import LEAST_SHARE, join_lists
from cachedit_fx.passes.locate import locate_blocks
from cachedit_fx.passes.symbols import hoist_symbols
from cachedit_fx.patterns.chain import BlockList, base_name, is_tensor, value_of
from cachedit_fx.patterns.matcher import match_any
from cachedit_fx.patterns.mismatch import Cause, Match, Mismatch


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
        lists = " -> ".join(f"{m.blocks.path} ({len(m.blocks.blocks)} blocks, {m.label})" for m in self.chain)
        regions = ", ".join(region.name for region in self.regions)
        names = [base_name(node) if node is not None else "none" for node in (self.timestep, self.conditioning)]
        return f"{lists}; region {regions}; timestep {names[0]}, conditioning {names[1]}"


def plan_graph(gm: fx.GraphModule, config: CacheConfig) -> Plan | tuple[Mismatch, ...]:
    """The plan for a graph whose inputs are labelled, or why it has none, nearest miss first. Compiles nothing."""
    hoist_symbols(gm)
    program = Program(gm.graph)
    if torch.is_grad_enabled() and any(is_tensor(n) and value_of(n).requires_grad for n in program.nodes):
        detail = (
            "expected a graph that needs no gradients, found weights that require them; run it under torch.no_grad()"
        )
        return (Mismatch(None, Cause.GRADIENTS, detail),)
    lists = locate_blocks(program)
    chain = join_lists(program, lists)
    if not chain:
        return _no_chain(program, lists)
    matches = []
    for blocks in chain:
        found = match_any(blocks)
        if not isinstance(found, Match):
            return found
        matches.append(found)
    regions = cut_regions(program, tuple(matches), config)
    if isinstance(regions, Mismatch):
        return (regions,)
    timestep = find_timestep(program, chain)
    conditioning = find_conditioning(program, chain, timestep)
    _tag_blocks(program, chain)
    return Plan(gm, program, tuple(matches), regions, timestep, conditioning)


def _no_chain(program: Program, lists: tuple[BlockList, ...]) -> tuple[Mismatch, ...]:
    """The verdicts on the heaviest list that was found, or that there is none."""
    total = sum(program.flops)
    outer = [blocks for blocks in lists if not any(part.isdigit() for part in blocks.path.split("."))]
    heavy = [blocks for blocks in outer if blocks.flops >= LEAST_SHARE * total]
    if heavy:
        found = match_any(max(heavy, key=lambda blocks: blocks.flops))
        if not isinstance(found, Match):
            return found
    listed = ", ".join(f"{b.path} ({len(b.blocks)} blocks)" for b in lists) or "none"
    detail = (
        f"expected a list of blocks that hand a stream on and make up most of the graph, found {listed}. If Dynamo "
        "broke the model up, TORCH_LOGS=graph_breaks says where; fullgraph=True makes it an error"
    )
    return (Mismatch(None, Cause.NO_CHAIN, detail),)


def _tag_blocks(program: Program, chain: tuple[BlockList, ...]) -> None:
    number = 0
    for blocks in chain:
        for block in blocks.blocks:
            for node in program.born(block.start, block.end):
                node.meta["cachedit_block"] = number
            number += 1
