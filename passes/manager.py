"""The way of a graph, in order: tidy it, locate blocks, join lists, match templates, cut regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import PatternError, cut
from cachedit_fx.passes.analysis.cut_regions import cut_regions
from cachedit_fx.passes.analysis.dataflow import Program, is_weight
from cachedit_fx.passes.analysis.join_lists import LEAST_SHARE, continues, flops_on_latents, join_lists
from cachedit_fx.passes.analysis.locate_blocks import locate_blocks
from cachedit_fx.passes.analysis.model_inputs import find_conditioning, find_timestep
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Group
from cachedit_fx.passes.transforms.defer_work import defer_work
from cachedit_fx.passes.transforms.drop_numpy_calls import drop_numpy_calls
from cachedit_fx.passes.transforms.functionalize_writes import functionalize_writes
from cachedit_fx.passes.transforms.hoist_symbols import hoist_symbols
from cachedit_fx.passes.transforms.inline_checkpoints import inline_checkpoints
from cachedit_fx.passes.transforms.narrow_contexts import narrow_contexts
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.matcher import match_any, match_list
from cachedit_fx.patterns.mismatch import Match, Mismatch
from cachedit_fx.patterns.nodes import is_tensor, value_of

TIDYING: tuple[Callable[[fx.GraphModule], object], ...] = (
    drop_numpy_calls,  # What nothing reads needs no place.
    hoist_symbols,  # Before the others: no later pass has to ask whether a value is one.
    narrow_contexts,  # Before anything moves: a node belongs to the context that it was made in.
    functionalize_writes,  # Last: it asks who else sees a value, and the passes before change that.
)


def plan_graph(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration | None = None, observer: Observer | None = None
) -> Plan | tuple[Mismatch, ...]:
    """The plan for a graph whose inputs are labelled, or why it has none, nearest miss first. Compiles nothing.

    Raises:
        PatternError: The graph contradicts what was declared.
    """
    declared, observer = declared or Declaration(), observer or Observer()
    observer.graph("captured", gm)
    inline_checkpoints(gm)  # A functor gets a graph that reads like the model's code.
    observer.graph("inline-checkpoints", gm)
    gm = _apply_functor(gm, declared)
    observer.graph("apply-functor", gm)
    for tidy in TIDYING:
        tidy(gm)
        observer.graph(tidy.__name__.replace("_", "-"), gm)
    found = _plan(gm, config, declared, observer)
    observer.planned(found)
    return found


def _plan(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration, observer: Observer
) -> Plan | tuple[Mismatch, ...]:
    program = Program(gm.graph)
    if torch.is_grad_enabled() and any(is_tensor(n) and value_of(n).requires_grad for n in program.nodes):
        detail = "expected a graph that needs no gradients, found weights that require them"
        return (Mismatch(None, Cause.GRADIENTS, detail),)
    given = (n for n in program.nodes if n.op == "placeholder" and is_tensor(n) and not is_weight(n))
    empty = next((n for n in given if any(isinstance(size, int) and not size for size in value_of(n).shape)), None)
    if empty is not None:
        detail = f"expected inputs with elements, found {empty.name} of shape {[*value_of(empty).shape]}"
        return (Mismatch(None, Cause.EMPTY, detail),)
    matches = _match(program, declared, observer)
    if isinstance(matches, list):
        return tuple(matches)
    chain = tuple(match.blocks for match in matches)
    timestep = find_timestep(program, chain)
    regions = cut_regions(program, group_lists(program, matches, config, declared), timestep)
    if isinstance(regions, Mismatch):
        return (regions,)
    regions = defer_work(program, regions)
    conditioning = find_conditioning(program, chain, timestep)
    _tag_blocks(program, chain)
    return Plan(gm, program, matches, regions, timestep, conditioning)


def _apply_functor(gm: fx.GraphModule, declared: Declaration) -> fx.GraphModule:
    if declared.functor is None:
        return gm
    name = type(declared.functor).__name__
    before = _inputs(gm)
    try:
        gm = declared.functor.apply(gm)
        gm.graph.lint()
    except Exception as error:
        raise PatternError(
            f"cachedit_fx: patch functor `{name}` failed on the captured graph: {type(error).__name__}: "
            f"{cut(error)}\n"
            "What to do: correct its apply; a graph that lacks what it looks for it has to hand back as it is."
        ) from error
    if _inputs(gm) != before:
        raise PatternError(
            f"cachedit_fx: patch functor `{name}` must leave the graph's inputs as they are, in number and order.\n"
            f"  expected: the {len(before)} that were captured\n"
            f"  found:    {_changed(before, _inputs(gm))}\n"
            "What to do: let its apply make values from the inputs that there are."
        )
    return gm


def _changed(before: Sequence[str], after: Sequence[str]) -> str:
    """`1 added (mask)`: how the inputs of a graph differ."""
    changes = {"added": [n for n in after if n not in before], "gone": [n for n in before if n not in after]}
    said = [f"{len(names)} {how} ({cut(', '.join(names))})" for how, names in changes.items() if names]
    return ", ".join(said) or "another order"


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]


def _match(program: Program, declared: Declaration, observer: Observer) -> tuple[Match, ...] | list[Mismatch]:
    """The chain's lists with the template that each fits: those declared, or those that the graph shows."""
    lists = locate_blocks(program)
    missing = set(declared.lists) - {path for blocks in lists for path in (blocks.path, *blocks.alternates)}
    if missing:  # Not an error: where Dynamo broke the model up this is one graph of many.
        detail = f"expected a graph that calls the declared {', '.join(declared.lists)}, found {_listed(lists)}"
        return [Mismatch(None, Cause.NO_CHAIN, detail)]
    chain = tuple(blocks for blocks in lists if blocks.path in declared.lists) or join_lists(program, lists)
    observer.lists(program, lists, chain)
    if not chain:
        return _no_chain(program, lists, declared)
    found: list[Match] = []
    mismatches: list[tuple[BlockList, Mismatch]] = []
    for blocks in chain:
        pattern = declared.pattern_for(blocks.path)
        verdict = match_list(blocks, pattern) if pattern is not None else match_any(blocks)
        observer.verdicts(blocks, verdict if isinstance(verdict, tuple) else (verdict,))
        if isinstance(verdict, tuple):
            return list(verdict)
        if isinstance(verdict, Match):
            found.append(verdict)
        else:
            mismatches.append((blocks, verdict))
    if mismatches and (declared.lists or not found):  # Of lists that were only found, those that fit are enough.
        raise PatternError(_contradiction(*mismatches[0]), mismatches[0][1])
    return tuple(found)


def _listed(lists: Sequence[BlockList]) -> str:
    return ", ".join(f"{blocks.path} ({len(blocks.blocks)} blocks)" for blocks in lists) or "none"


def _contradiction(blocks: BlockList, mismatch: Mismatch) -> str:
    found = match_any(blocks)
    fits = f"{blocks.path} fits {found.label}" if isinstance(found, Match) else "No other pattern fits either"
    return "\n".join(
        (
            f"cachedit_fx: {mismatch.template} was declared for {blocks.path}, but its graph shows something else; "
            f"{mismatch.cause.value}:",
            *mismatch.lines,
            f"{fits}. Declare what is found, or skip the check with check_forward_pattern=False.",
        )
    )


def group_lists(
    program: Program, matches: Sequence[Match], config: CacheConfig, declared: Declaration
) -> tuple[Group, ...]:
    """Lists that are decided about together: all that continue each other, or with a say of their own each alone."""
    overrides = declared.overrides
    if len(overrides) == 1:
        overrides *= len(matches)
    if overrides and len(overrides) != len(matches) and not declared.lists:
        paths = ", ".join(match.blocks.path for match in matches)
        raise PatternError(
            f"cachedit_fx: params_modifiers must have one entry per block list, {len(matches)} ({paths}), got "
            f"{len(overrides)}; give one for all, or one for each in this order"
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


def _no_chain(program: Program, lists: tuple[BlockList, ...], declared: Declaration) -> list[Mismatch]:
    """The verdicts on the heaviest list that was found, or that there is none."""
    outer = [blocks for blocks in lists if not any(part.isdigit() for part in blocks.path.split("."))]
    heavy = [blocks for blocks in outer if blocks.flops >= LEAST_SHARE * flops_on_latents(program, blocks)]
    if heavy:
        heaviest = max(heavy, key=lambda blocks: blocks.flops)
        pattern = declared.pattern_for(heaviest.path)
        found = match_any(heaviest, None if pattern is None else (pattern,))
        if not isinstance(found, Match):
            return list(found)
    detail = f"expected a list of blocks that hand a stream on and make up most of the graph, found {_listed(lists)}"
    return [Mismatch(None, Cause.NO_CHAIN, detail)]


def _tag_blocks(program: Program, chain: tuple[BlockList, ...]) -> None:
    number = 0
    for blocks in chain:
        for block in blocks.blocks:
            for node in program.nodes_in(block.start, block.end):
                node.meta["cachedit_block"] = number
            number += 1
