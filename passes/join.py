"""Which block lists make up the chain: the heaviest, and those that its hidden stream runs through. Reads only."""

from __future__ import annotations

from cachedit_fx.passes.dataflow import Program
from cachedit_fx.patterns.chain import HIDDEN, BlockList

# Frames that Dynamo broke up hold lists of norms or feed-forward layers, but these are a small part of their graph.
LEAST_SHARE = 1 / 3


def join_lists(program: Program, lists: tuple[BlockList, ...]) -> tuple[BlockList, ...]:
    """The chain's lists in execution order; empty where no list carries a stream or all are a small part of the graph.

    Two lists are joined if the hidden stream that leaves the one enters the other as its stream: a list whose result
    is a side input (WanVACE's control blocks) or an invariant (a text encoder) is no part of the chain.
    """
    carried = [blocks for blocks in lists if blocks.is_carried]
    if not carried:
        return ()
    chain = [_main_list(program, carried)]
    grown = True
    while grown:
        grown = False
        for blocks in carried:
            if blocks in chain:
                continue
            if continues(program, blocks, chain[0]):
                chain.insert(0, blocks)
            elif continues(program, chain[-1], blocks):
                chain.append(blocks)
            else:
                continue
            grown = True
    share = sum(blocks.flops for blocks in chain)
    return tuple(chain) if share >= LEAST_SHARE * flops_on_latents(program, chain[0]) else ()


def _main_list(program: Program, carried: list[BlockList]) -> BlockList:
    """The heaviest list; one behind it that it only makes a side input of goes before it, if it is not a small part."""
    main = max(carried, key=lambda blocks: blocks.flops)
    for blocks in sorted(carried, key=lambda blocks: blocks.flops, reverse=True):
        start, stop = main.blocks[-1].end, blocks.blocks[0].start
        if stop < start or blocks.flops < LEAST_SHARE * flops_on_latents(program, blocks):
            continue
        exits = set(main.boundaries[-1].values())
        behind = program.descendants_within(exits, start, blocks.blocks[-1].end)
        if behind & set(blocks.boundaries[-1].values()) and not continues(program, main, blocks):
            main = blocks
    return main


def flops_on_latents(program: Program, blocks: BlockList) -> int:
    """The work on what the latents turn into; that on the text alone, however large, says nothing about a chain."""
    latents = program.latent_inputs(blocks.boundaries[0].get(HIDDEN)) if blocks.boundaries else frozenset()
    if not latents:
        return sum(program.flops)
    return sum(
        flops for node, flops in zip(program.nodes, program.flops, strict=True) if program.inputs_behind(node) & latents
    )


def continues(program: Program, first: BlockList, second: BlockList) -> bool:
    """Whether the hidden stream of `second` is what `first` hands out, moved about or added to.

    If the latents reach it beside `first` (a control signal added to the embedded image), `first` is no part of it.
    """
    start, stop = first.blocks[-1].end, second.blocks[0].start
    if stop < start:
        return False
    entry = second.boundaries[0].get(HIDDEN) or next(iter(second.boundaries[0].values()))
    exits, entries = set(first.boundaries[-1].values()), set(first.boundaries[0].values())
    spine = program.residual_spine(entry, start)
    through = entries | program.descendants_within(entries, first.blocks[0].start, stop)
    latents = program.latent_inputs(entry)
    return bool(exits & spine) and not any(program.inputs_behind(node) & latents for node in spine - through)
