"""Locates the blocks of a graph, matches their templates and cuts the regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import PatternError
from cachedit_fx.passes.analysis.convolutions import find_convolutions
from cachedit_fx.passes.analysis.cut_regions import cut_regions
from cachedit_fx.passes.analysis.dataflow import Program, is_weight
from cachedit_fx.passes.analysis.defer_work import defer_work
from cachedit_fx.passes.analysis.join_lists import LEAST_SHARE, continues, flops_on_latents, join_lists
from cachedit_fx.passes.analysis.locate_blocks import locate_blocks
from cachedit_fx.passes.analysis.model_inputs import find_conditioning, find_timestep
from cachedit_fx.passes.analysis.rank_groups import find_rank_groups
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Group
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.matcher import match_any, match_list
from cachedit_fx.patterns.mismatch import Match, Mismatch, MismatchError
from cachedit_fx.patterns.nodes import is_tensor, value_of


def make_plan(gm: fx.GraphModule, config: CacheConfig, declared: Declaration, observer: Observer) -> Plan:
    """The plan for a graph that the transforms before the analysis have prepared.

    Raises:
        MismatchError: The graph cannot be cached. It carries the mismatches, the nearest one first.
        PatternError: The graph contradicts what was declared.
    """
    program = Program(gm.graph)
    _check_inputs(program)
    matches = _match(program, declared, observer)
    chain = tuple(match.blocks for match in matches)
    timestep = find_timestep(program, chain)
    regions = cut_regions(program, group_lists(program, matches, config, declared), timestep)
    regions = find_rank_groups(defer_work(program, regions))
    conditioning = find_conditioning(program, chain, timestep)
    _tag_blocks(program, chain)
    return Plan(gm, program, matches, regions, timestep, conditioning)


def _check_inputs(program: Program) -> None:
    """Refuses a graph that needs gradients, and one with an input that has no elements."""
    if torch.is_grad_enabled() and any(is_tensor(n) and value_of(n).requires_grad for n in program.nodes):
        expected, found = "a graph that needs no gradients", "weights or inputs that require gradients"
        raise MismatchError(Mismatch(None, Cause.GRADIENTS, expected, found))
    given = (n for n in program.nodes if n.op == "placeholder" and is_tensor(n) and not is_weight(n))
    empty = next((n for n in given if any(isinstance(size, int) and not size for size in value_of(n).shape)), None)
    if empty is not None:
        found = f"{empty.name} of shape {[*value_of(empty).shape]}"
        raise MismatchError(Mismatch(None, Cause.EMPTY, "inputs that have elements", found))


def _match(program: Program, declared: Declaration, observer: Observer) -> tuple[Match, ...]:
    """The lists of the chain, declared or found, with the template that each of them fits.

    Raises:
        MismatchError: There is no chain, or no template fits one of its lists.
        PatternError: A list does not fit the template that was declared for it.
    """
    lists = locate_blocks(program)
    missing = set(declared.lists) - {path for blocks in lists for path in (blocks.path, *blocks.alternates)}
    if missing:  # This is not an error: if Dynamo breaks the model up, this graph is one of several.
        expected = f"a graph that calls the declared lists {', '.join(declared.lists)}"
        raise MismatchError(Mismatch(None, Cause.NO_CHAIN, expected, _listed(lists)))
    chain = tuple(blocks for blocks in lists if blocks.path in declared.lists) or join_lists(program, lists)
    observer.lists(program, lists, chain)
    if not chain:
        _refuse(program, lists, declared)
    matches: list[Match] = []
    contradictions: list[tuple[BlockList, Mismatch]] = []
    for blocks in chain:
        pattern = declared.pattern_for(blocks.path)
        try:
            match = match_any(blocks) if pattern is None else match_list(blocks, pattern)
        except MismatchError as error:
            observer.mismatched(blocks, error.mismatches)
            if pattern is None:
                raise
            contradictions.append((blocks, error.mismatches[0]))
        else:
            observer.matched(match)
            matches.append(match)
    if contradictions and (declared.lists or not matches):  # If no lists were declared, those that fit are enough.
        raise _contradiction(*contradictions[0])
    return tuple(matches)


def _listed(lists: Sequence[BlockList]) -> str:
    return ", ".join(f"{blocks.path} ({len(blocks.blocks)} blocks)" for blocks in lists) or "no list of blocks"


def _contradiction(blocks: BlockList, mismatch: Mismatch) -> PatternError:
    """The error for a list that does not fit its declared template. It names a template that the list fits."""
    try:
        fits = f"{blocks.path} fits {match_any(blocks).label}"
    except MismatchError:
        fits = "No other pattern fits either"
    text = "\n".join(
        (
            f"cachedit_fx: {mismatch.template} was declared for {blocks.path}, but the captured graph contradicts it: "
            f"{mismatch.cause.value}",
            *mismatch.lines,
            f"{fits}. Declare a pattern that fits, or skip the check with check_forward_pattern=False.",
        )
    )
    return PatternError(text, mismatch, fits)


def group_lists(
    program: Program, matches: Sequence[Match], config: CacheConfig, declared: Declaration
) -> tuple[Group, ...]:
    """The groups of lists that share a region: consecutive lists that continue each other.

    Every list is a group of its own with `regions="per_list"`, and if any list overrides the configuration.

    Raises:
        PatternError: The number of overrides differs from the number of lists.
    """
    overrides = declared.overrides
    if len(overrides) == 1:
        overrides *= len(matches)
    if overrides and len(overrides) != len(matches) and not declared.lists:
        paths = ", ".join(match.blocks.path for match in matches)
        raise PatternError(
            f"cachedit_fx: params_modifiers must have one entry per block list, {len(matches)} ({paths}), got "
            f"{len(overrides)}; give one for all lists, or one for each list in this order"
        )
    by_path = dict(zip(declared.lists or [match.blocks.path for match in matches], overrides, strict=False))
    alone = config.regions == "per_list" or declared.has_overrides
    groups: list[Group] = []
    number = 0
    for match in matches:
        last = groups[-1] if groups else None
        if last is not None and not alone and continues(program, last.matches[-1].blocks, match.blocks):
            groups[-1] = replace(last, matches=(*last.matches, match))
        else:
            mine = by_path.get(match.blocks.path)
            groups.append(Group((match,), config.override(mine), mine, number))
        number += len(match.blocks.blocks)
    return tuple(groups)


def _refuse(program: Program, lists: tuple[BlockList, ...], declared: Declaration) -> NoReturn:
    """Raises the mismatches of the list with the most FLOPs, or the one that says that there is no chain.

    Raises:
        MismatchError: Always.
    """
    convolutions = find_convolutions(program)
    if convolutions.is_unet:
        expected = "a chain of equal transformer blocks that makes up most of the graph"
        raise MismatchError(Mismatch(None, Cause.NO_TRANSFORMER, expected, str(convolutions)))
    heaviest = nearest_list(program, lists)
    if heaviest is not None:
        pattern = declared.pattern_for(heaviest.path)
        match_any(heaviest, None if pattern is None else (pattern,))
    expected = "a list of blocks that pass on a stream and make up most of the graph"
    raise MismatchError(Mismatch(None, Cause.NO_CHAIN, expected, _listed(lists)))


def nearest_list(program: Program, lists: Sequence[BlockList]) -> BlockList | None:
    """The list with the most FLOPs that is no part of a block and no small part of the graph; None if there is none."""
    outer = [blocks for blocks in lists if not any(part.isdigit() for part in blocks.path.split("."))]
    heavy = [blocks for blocks in outer if blocks.flops >= LEAST_SHARE * flops_on_latents(program, blocks)]
    return max(heavy, key=lambda blocks: blocks.flops, default=None)


def _tag_blocks(program: Program, chain: tuple[BlockList, ...]) -> None:
    """Writes the number of the block into the metadata of its nodes."""
    number = 0
    for blocks in chain:
        for block in blocks.blocks:
            for node in program.nodes_in(block.start, block.end):
                node.meta["cachedit_block"] = number
            number += 1
