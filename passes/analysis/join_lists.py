"""Finds the chain: the block list with the most FLOPs, and the lists that its hidden stream runs through."""

from __future__ import annotations

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.patterns.blocks import HIDDEN, BlockList

# The least share of the FLOPs of a graph that a chain has. The graphs of a model that Dynamo broke up contain lists of
# norms or feed-forward layers, which are a small part of their graph.
LEAST_SHARE = 1 / 3


def join_lists(program: Program, lists: tuple[BlockList, ...]) -> tuple[BlockList, ...]:
    """The lists of the chain in execution order; empty if no list has a stream, or all are a small part of the graph.

    Two lists are joined if the hidden stream that leaves the first enters the second as its hidden stream. A list whose
    output is a side input (control blocks) or an invariant (a text encoder) is not part of the chain.
    """
    with_stream = [blocks for blocks in lists if blocks.has_stream]
    if not with_stream:
        return ()
    chains = [_grow(program, blocks, with_stream) for blocks in with_stream]
    chain = max(chains, key=_flops_of)
    for other in sorted(chains, key=_flops_of, reverse=True):
        is_small = _flops_of(other) < LEAST_SHARE * (_flops_of(other) + _flops_of(chain))
        if not is_small and _makes_side_input(program, chain, other):
            chain = other
    return chain if _is_main(program, chain) else ()


def _grow(program: Program, blocks: BlockList, with_stream: list[BlockList]) -> tuple[BlockList, ...]:
    """The list, with the lists that it continues and those that continue it."""
    chain = [blocks]
    grown = True
    while grown:
        grown = False
        for other in with_stream:
            if other in chain:
                continue
            if continues(program, other, chain[0]):
                chain.insert(0, other)
            elif continues(program, chain[-1], other):
                chain.append(other)
            else:
                continue
            grown = True
    return tuple(chain)


def _flops_of(chain: tuple[BlockList, ...]) -> int:
    return sum(blocks.flops for blocks in chain)


def _is_main(program: Program, chain: tuple[BlockList, ...]) -> bool:
    """Whether the chain has at least `LEAST_SHARE` of the FLOPs on the latents."""
    return _flops_of(chain) >= LEAST_SHARE * flops_on_latents(program, chain[0])


def _makes_side_input(program: Program, first: tuple[BlockList, ...], second: tuple[BlockList, ...]) -> bool:
    """Whether `second` comes after `first` and depends on its output, but does not continue it."""
    start, stop = first[-1].blocks[-1].end, second[0].blocks[0].start
    if stop < start or continues(program, first[-1], second[0]):
        return False
    behind = program.descendants_within(set(first[-1].boundaries[-1].values()), start, second[-1].blocks[-1].end)
    return bool(behind & set(second[-1].boundaries[-1].values()))


def flops_on_latents(program: Program, blocks: BlockList) -> int:
    """The FLOPs of the nodes that depend on the latents; of all nodes if the latents are unknown.

    Work on the text alone does not count: a large text encoder does not make a chain small.
    """
    latents = program.latent_inputs(blocks.boundaries[0].get(HIDDEN)) if blocks.boundaries else frozenset()
    if not latents:
        return sum(program.flops)
    return sum(
        flops for node, flops in zip(program.nodes, program.flops, strict=True) if program.inputs_behind(node) & latents
    )


def continues(program: Program, first: BlockList, second: BlockList) -> bool:
    """Whether the hidden stream of `second` is an output of `first`, after additions and layout operations.

    If the latents also reach it without passing through `first` (a control signal that is added to the embedded image),
    `first` does not continue.
    """
    start, stop = first.blocks[-1].end, second.blocks[0].start
    if stop < start:
        return False
    entry = second.boundaries[0].get(HIDDEN) or next(iter(second.boundaries[0].values()))
    exits, entries = set(first.boundaries[-1].values()), set(first.boundaries[0].values())
    residual_path = program.residual_path(entry, start)
    through = entries | program.descendants_within(entries, first.blocks[0].start, stop)
    latents = program.latent_inputs(entry)
    return bool(exits & residual_path) and not any(
        program.inputs_behind(node) & latents for node in residual_path - through
    )
