"""A region that reaches to what the graph returns: a reused step hands that out again. Reads only.

blocks -> norm_out -> proj_out -> return   ->   compute_or_reuse(pred, all of it, what was returned last time) -> return
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from cachedit_fx.config.cache_config import CacheType
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.find_probe import Probe
from cachedit_fx.passes.analysis.live_outs import behind, made_of, with_parts
from cachedit_fx.passes.analysis.region_checks import check_state, check_writes
from cachedit_fx.passes.analysis.writes import is_in_place, storage_of
from cachedit_fx.passes.region import Group, LiveOut, Region, mismatch_of, region_name
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.patterns.nodes import depends_on_data, describe, is_tensor, value_of


def check_reach(group: Group) -> Mismatch | None:
    """What `reach="output"` asks of the other fields of the configuration."""
    config, match = group.config, group.matches[0]
    if config.cache_type == CacheType.DBPrune:
        detail = "expected one region (cache_type='DBCache') with reach='output', found cache_type='DBPrune'"
        return mismatch_of(match, Cause.REACH, detail)
    if config.Bn_compute_blocks:
        detail = f"expected Bn_compute_blocks=0 with reach='output', found {config.Bn_compute_blocks}"
        return mismatch_of(match, Cause.REACH, detail)
    return None


def cut_to_output(program: Program, group: Group, probe: Probe) -> Region | Mismatch:
    """The region from the block behind the Fn blocks to the end of the graph.

    What the graph returns without the blocks (a time embedding, a view of an input) is made at every step.
    """
    first, last, match = group.config.Fn_compute_blocks, len(group.blocks), group.matches[0]
    start, stop = group.blocks[first].start, len(program.nodes) - 1
    inside = set(program.nodes_in(start, stop)).difference(probe.moved)
    returned = list(dict.fromkeys(program.nodes[stop].all_input_nodes))
    made = _made_by_blocks(program, group, first, inside)
    supplied = [node for node in returned if node in made and not _is_alias(program, node, inside)]
    outside = [node for node in returned if node in inside and node not in supplied]
    hoisted = with_parts(behind(outside, inside), inside).union(probe.moved)
    nodes = tuple(node for node in program.nodes_in(start, stop) if node not in hoisted)
    mismatch = _check_returned(group, supplied)
    if mismatch is None:  # A mismatch is falsy.
        # A state that is set back behind the blocks was set before them, where it would stay.
        mismatch = check_state(program, match, (start, *range(group.blocks[-1].end, stop)), hoisted)
    if mismatch is None:
        mismatch = check_writes(program, match, probe.since, nodes)
    if mismatch is not None:
        return mismatch
    return Region(
        name=f"{region_name(group, first, last)} -> output", first=group.number + first, last=group.number + last,
        nodes=nodes, overrides=group.overrides, probed_at=probe.at, probed_since=probe.since,
        live_outs=tuple(LiveOut(role, None, node) for role, node in _roles(supplied).items()),
        hoisted=tuple(node for node in program.nodes if node in hoisted), reaches_output=True,
        sample_dim=probe.sample_dim,
    )  # fmt: skip


def _made_by_blocks(program: Program, group: Group, first: int, inside: set[fx.Node]) -> set[fx.Node]:
    """What the region's blocks make of the streams, all that is made of it, and what it is written into."""
    blocks, written = group.blocks, set[int | None]()
    made = made_of(program, set(group.boundaries[first].values()), blocks[first], blocks[-1].end) & inside
    for node in program.nodes[blocks[first].start :]:
        if node not in inside:
            continue
        if any(arg in made for arg in node.all_input_nodes):
            made.add(node)
            if is_in_place(node) and isinstance(node.args[0], fx.Node):
                written.add(storage_of(node.args[0]))
        elif storage_of(node) in written - {None}:
            made.add(node)
    return made


def _is_alias(program: Program, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a returned value is a view of what was made outside of the region, as of an input."""
    mine = storage_of(node)
    others = (other for other in program.nodes if other not in inside and other.op != "output")
    return mine is not None and any(storage_of(other) == mine for other in others)


def _check_returned(group: Group, supplied: list[fx.Node]) -> Mismatch | None:
    match = group.matches[-1]
    if not supplied:
        detail = f"expected a graph that returns what {group.paths} make (reach='output'), found none of it returned"
        return mismatch_of(match, Cause.REACH, detail)
    for node in supplied:
        if not is_tensor(node):
            detail = f"expected a graph that returns tensors only (reach='output'), found {node.name}"
            return mismatch_of(match, Cause.REACH, detail, node)
        if any(map(depends_on_data, value_of(node).shape)):
            detail = f"expected a graph that returns sizes its inputs tell (reach='output'), found {describe(node)}"
            return mismatch_of(match, Cause.REACH, detail, node)
    return None


def _roles(supplied: list[fx.Node]) -> Mapping[str, fx.Node]:
    if len(supplied) == 1:
        return {"output": supplied[0]}
    return {f"output_{i}": node for i, node in enumerate(supplied)}
