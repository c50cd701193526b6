"""Where the chain is cut: Fn and Bn turn into regions; what enters one is paired with what leaves it. Reads only.

    head: ... blocks[:Fn]  |  region: blocks[Fn : N - Bn]  |  tail: blocks[N - Bn :] ...

Work between two blocks belongs to the block before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from cachedit_fx.config.cache_config import CacheType
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.find_probe import Probe, find_probe, per_sample
from cachedit_fx.passes.analysis.live_outs import (
    behind,
    made_of,
    pair_streams,
    rejoin,
    rematerialized,
    undo_joins,
    values_of,
)
from cachedit_fx.passes.analysis.reach_output import check_reach, cut_to_output
from cachedit_fx.passes.analysis.region_checks import check_state, check_writes
from cachedit_fx.passes.region import Group, LiveOut, Region, mismatch_of, region_name
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch
from cachedit_fx.patterns.nodes import describe, is_tensor


def cut_regions(
    program: Program, groups: Sequence[Group], timestep: fx.Node | None = None
) -> tuple[Region, ...] | Mismatch:
    """The regions of every group: its middle blocks, or where blocks are pruned each of them on its own.

    With `reach="output"` the last group's region goes on to what the graph returns; what lies between two groups is
    needed at every step.

    Args:
        timestep: The placeholder that tells where in its generation a call stands.
    """
    regions: list[Region] = []
    for group in groups:
        reaches_output = group is groups[-1] and group.config.reach == "output"
        mismatch = _check_blocks(group)
        if mismatch is None and reaches_output:  # A mismatch is falsy.
            mismatch = check_reach(group)
        if mismatch is not None:
            return mismatch
        prune = group.config.cache_type == CacheType.DBPrune
        cut = _cut_every(program, group, timestep) if prune else _cut_middle(program, group, timestep, reaches_output)
        if isinstance(cut, Mismatch):
            return cut
        regions += cut
    return tuple(regions)


def _check_blocks(group: Group) -> Mismatch | None:
    fn, bn, total = group.config.Fn_compute_blocks, group.config.Bn_compute_blocks, len(group.blocks)
    if fn + bn >= total:
        return Mismatch(
            group.matches[0].template, Cause.TOO_FEW_BLOCKS,
            f"expected Fn_compute_blocks + Bn_compute_blocks < {total}, the number of blocks of {group.paths}, "
            f"found {fn} + {bn}",
            progress=total, total=total,
        )  # fmt: skip
    partial = next((m for m in group.matches if not m.blocks.has_its_first), None)
    if partial is not None:
        path, first = partial.blocks.path, partial.blocks.blocks[0].path
        detail = f"expected a chain that starts at the first block of {path}, found {first}: Dynamo broke it up"
        return mismatch_of(partial, Cause.NO_CHAIN, detail)
    return None


def _cut_middle(
    program: Program, group: Group, timestep: fx.Node | None, reaches_output: bool
) -> list[Region] | Mismatch:
    fn, last = group.config.Fn_compute_blocks, len(group.blocks) - group.config.Bn_compute_blocks
    probe = find_probe(program, group, timestep)
    if isinstance(probe, Mismatch):
        return probe
    found = cut_to_output(program, group, probe) if reaches_output else _cut(program, group, fn, last, probe)
    return found if isinstance(found, Mismatch) else [found]


def _cut_every(program: Program, group: Group, timestep: fx.Node | None) -> list[Region] | Mismatch:
    """One region per block that may be pruned. One that can't be cut on its own is always computed."""
    config, streams = group.config, group.boundaries
    regions: list[Region] = []
    mismatches: list[Mismatch] = []
    for i in range(config.Fn_compute_blocks, len(group.blocks) - config.Bn_compute_blocks):
        if i in config.non_prune_block_ids:
            continue
        found = _cut(program, group, i, i + 1, per_sample(Probe(streams[i][HIDDEN]), group, timestep))
        if isinstance(found, Region):
            regions.append(found)
        else:
            mismatches.append(found)
    if regions:
        return regions
    detail = f"expected a block of {group.paths} that may be pruned, found all among non_prune_block_ids"
    return mismatches[0] if mismatches else mismatch_of(group.matches[0], Cause.TOO_FEW_BLOCKS, detail)


def _cut(program: Program, group: Group, first: int, last: int, probe: Probe) -> Region | Mismatch:
    """The region of the group's blocks `first` to `last` (exclusive)."""
    blocks, match = group.blocks, group.matches[0]
    is_end = last == len(blocks)
    start, stop = blocks[first].start, blocks[-1].end if is_end else blocks[last].start
    before, after = group.boundaries[first], group.boundaries[last]
    nodes = [n for n in program.nodes_in(start, stop) if n not in probe.moved]
    if is_end:
        nodes += undo_joins(program, before, after, nodes)
    inside = set(nodes)
    made = made_of(program, set(before.values()), blocks[first], stop) | (inside - set(program.nodes[start:stop]))
    made -= set(probe.moved)
    leaving = [n for n in nodes if any(user not in inside for user in n.users)]
    sunk = rematerialized(program, made, leaving, values_of(group, after))
    needed = [n for n in leaving if n not in made] + [arg for n in sunk for arg in n.all_input_nodes if arg not in made]
    hoisted = behind([n for n in needed if n in inside], inside) | set(probe.moved)
    nodes = [n for n in nodes if n not in hoisted and n not in sunk]
    leaving = [n for n in leaving if n in made and n not in sunk]
    live_outs = pair_streams(group, before, after, leaving)
    live_outs = rejoin(program, group, first, last, before, live_outs)
    mismatch = check_state(program, match, (start, stop), hoisted)
    if mismatch is None:  # A mismatch is falsy.
        mismatch = _check_live_outs(match, before, live_outs)
    if mismatch is None:
        mismatch = check_writes(program, match, probe.since, nodes)
    if mismatch is not None:
        return mismatch
    return Region(
        name=region_name(group, first, last), first=group.number + first, last=group.number + last, nodes=tuple(nodes),
        overrides=group.overrides, probed_at=probe.at, probed_since=probe.since, live_outs=tuple(live_outs),
        hoisted=tuple(sorted(hoisted, key=program.position.__getitem__)), sample_dim=probe.sample_dim,
    )  # fmt: skip


def _check_live_outs(match: Match, before: Mapping[str, fx.Node], live_outs: Sequence[LiveOut]) -> Mismatch | None:
    """Only tensors leave a region, and at least one of them continues what entered it."""
    for pair in live_outs:
        if not is_tensor(pair.after):
            detail = f"expected only tensors to leave the region, found {pair.after.name}"
            return mismatch_of(match, Cause.DYNAMIC, detail, pair.after)
        if pair.is_measured and pair.joins is not None:
            detail = f"expected streams of known sizes where lists are joined, found {describe(pair.after)}"
            return mismatch_of(match, Cause.DYNAMIC, detail, pair.after)
    valued = {role for role, kind in match.template.cached.items() if kind == "value"}
    if not any(pair.before is not None or pair.role in valued for pair in live_outs):
        detail = (
            f"expected a stream that leaves the region as it entered ({', '.join(map(describe, before.values()))}), "
            f"found {', '.join(describe(pair.after) for pair in live_outs) or 'nothing that is used after it'}"
        )
        return mismatch_of(match, Cause.UNPAIRED, detail, live_outs[0].after if live_outs else None)
    return None
