"""Cuts the chain into regions, according to the numbers of Fn and Bn blocks.

    head: ... blocks[:Fn]  |  region: blocks[Fn : N - Bn]  |  tail: blocks[N - Bn :] ...

Nodes between two blocks belong to the first of them.
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
from cachedit_fx.passes.region import Group, LiveOut, Region, mismatch_error, region_name
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch, MismatchError
from cachedit_fx.patterns.nodes import describe, is_tensor


def cut_regions(program: Program, groups: Sequence[Group], timestep: fx.Node | None = None) -> tuple[Region, ...]:
    """The regions of all groups: the middle blocks of each group, or each of them separately if blocks are pruned.

    With `reach="output"`, the region of the last group extends to the output of the graph. What lies between two groups
    runs at every step.

    Args:
        timestep: The placeholder of the timestep, if there is one.

    Raises:
        MismatchError: A group cannot be cut.
    """
    regions: list[Region] = []
    for group in groups:
        reaches_output = group is groups[-1] and group.config.reach == "output"
        _check_blocks(group)
        if reaches_output:
            check_reach(group)
        if group.config.cache_type == CacheType.DBPrune:
            regions += _cut_every(program, group, timestep)
        else:
            regions.append(_cut_middle(program, group, timestep, reaches_output))
    return tuple(regions)


def _check_blocks(group: Group) -> None:
    fn, bn, total = group.config.Fn_compute_blocks, group.config.Bn_compute_blocks, len(group.blocks)
    if fn + bn >= total:
        expected = f"Fn_compute_blocks + Bn_compute_blocks < {total}, the number of blocks of {group.paths}"
        template = group.matches[0].template
        raise MismatchError(
            Mismatch(template, Cause.TOO_FEW_BLOCKS, expected, f"{fn} + {bn}", progress=total, total=total)
        )
    partial = next((m for m in group.matches if not m.blocks.has_its_first), None)
    if partial is not None:
        path, first = partial.blocks.path, partial.blocks.blocks[0].path
        expected = f"a chain that begins with the first block of {path}"
        found = f"a chain that begins with {first}, because Dynamo broke the model up"
        raise mismatch_error(partial, Cause.NO_CHAIN, expected, found)


def _cut_middle(program: Program, group: Group, timestep: fx.Node | None, reaches_output: bool) -> Region:
    fn, last = group.config.Fn_compute_blocks, len(group.blocks) - group.config.Bn_compute_blocks
    probe = find_probe(program, group, timestep)
    return cut_to_output(program, group, probe) if reaches_output else _cut(program, group, fn, last, probe)


def _cut_every(program: Program, group: Group, timestep: fx.Node | None) -> list[Region]:
    """One region per block that may be pruned. A block that cannot be cut separately runs at every step."""
    config, streams = group.config, group.boundaries
    regions: list[Region] = []
    errors: list[MismatchError] = []
    for i in range(config.Fn_compute_blocks, len(group.blocks) - config.Bn_compute_blocks):
        if i in config.non_prune_block_ids:
            continue
        probe = per_sample(Probe(streams[i][HIDDEN]), group, timestep)
        try:
            regions.append(_cut(program, group, i, i + 1, probe))
        except MismatchError as error:
            errors.append(error)
    if regions:
        return regions
    if errors:
        raise errors[0]
    expected, found = f"a block of {group.paths} that may be pruned", "every block is in non_prune_block_ids"
    raise mismatch_error(group.matches[0], Cause.TOO_FEW_BLOCKS, expected, found)


def _cut(program: Program, group: Group, first: int, last: int, probe: Probe) -> Region:
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
    check_state(program, match, (start, stop), hoisted)
    _check_live_outs(match, before, live_outs)
    check_writes(program, match, probe.since, nodes)
    return Region(
        name=region_name(group, first, last), first=group.number + first, last=group.number + last, nodes=tuple(nodes),
        overrides=group.overrides, probed_at=probe.at, probed_since=probe.since, live_outs=tuple(live_outs),
        hoisted=tuple(sorted(hoisted, key=program.position.__getitem__)), sample_dim=probe.sample_dim,
    )  # fmt: skip


def _check_live_outs(match: Match, before: Mapping[str, fx.Node], live_outs: Sequence[LiveOut]) -> None:
    """Checks that only tensors leave a region, and that at least one of them continues a stream that enters it."""
    for pair in live_outs:
        role, after = pair.role, pair.after
        if not is_tensor(after):
            expected, found = "a region that only tensors leave", f"{after.name}, which is not a tensor, leaves it"
            raise mismatch_error(match, Cause.DYNAMIC, expected, found, after)
        if pair.is_measured and pair.joins is not None:
            expected = "streams whose sizes are known before the call where lists are joined"
            raise mismatch_error(match, Cause.DYNAMIC, expected, describe(after), after, stream=role)
    valued = {role for role, kind in match.template.cached.items() if kind == "value"}
    if not any(pair.before is not None or pair.role in valued for pair in live_outs):
        entering = ", ".join(map(describe, before.values()))
        leaving = ", ".join(describe(pair.after) for pair in live_outs)
        expected = f"a stream that leaves the region with the shape with which it entered ({entering})"
        node = live_outs[0].after if live_outs else None
        raise mismatch_error(match, Cause.UNPAIRED, expected, leaving or "no value that is used after the region", node)
