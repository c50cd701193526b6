"""Cuts a region that extends to the output of the graph. A reused step returns the cached output.

blocks -> norm_out -> proj_out -> return     ->     compute_or_reuse(pred, all of these, cached output) -> return
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
from cachedit_fx.passes.region import Group, LiveOut, Region, mismatch_error, region_name
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.nodes import depends_on_data, describe, is_tensor, value_of


def check_reach(group: Group) -> None:
    """Checks that the other fields of the configuration permit `reach="output"`.

    Raises:
        MismatchError: They do not.
    """
    config, match = group.config, group.matches[0]
    if config.cache_type == CacheType.DBPrune:
        expected, found = "one region (cache_type='DBCache') with reach='output'", "cache_type='DBPrune'"
        raise mismatch_error(match, Cause.REACH, expected, found)
    if config.Bn_compute_blocks:
        expected, found = "Bn_compute_blocks=0 with reach='output'", f"Bn_compute_blocks={config.Bn_compute_blocks}"
        raise mismatch_error(match, Cause.REACH, expected, found)


def cut_to_output(program: Program, group: Group, probe: Probe) -> Region:
    """The region from the first block after the Fn blocks to the end of the graph.

    Outputs that do not depend on the blocks (a time embedding, a view of an input) are computed at every step.

    Raises:
        MismatchError: The outputs cannot be cached, or a reused step would miss a write or a context.
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
    _check_returned(group, supplied)
    # A state that is reset after the blocks was set before them. A reused step would not reset it.
    check_state(program, match, (start, *range(group.blocks[-1].end, stop)), hoisted)
    check_writes(program, match, probe.since, nodes)
    return Region(
        name=f"{region_name(group, first, last)} -> output", first=group.number + first, last=group.number + last,
        nodes=nodes, overrides=group.overrides, probed_at=probe.at, probed_since=probe.since,
        live_outs=tuple(LiveOut(role, None, node) for role, node in _roles(supplied).items()),
        hoisted=tuple(node for node in program.nodes if node in hoisted), reaches_output=True,
        sample_dim=probe.sample_dim,
    )  # fmt: skip


def _made_by_blocks(program: Program, group: Group, first: int, inside: set[fx.Node]) -> set[fx.Node]:
    """What the blocks of the region compute from the streams, what depends on it, and what it is written into."""
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
    """Whether a returned value is a view of a value from outside of the region, for example of an input."""
    mine = storage_of(node)
    others = (other for other in program.nodes if other not in inside and other.op != "output")
    return mine is not None and any(storage_of(other) == mine for other in others)


def _check_returned(group: Group, supplied: list[fx.Node]) -> None:
    match = group.matches[-1]
    if not supplied:
        expected = f"a graph that returns what {group.paths} compute (reach='output')"
        raise mismatch_error(match, Cause.REACH, expected, "no output depends on these blocks")
    for node in supplied:
        if not is_tensor(node):
            expected, found = "a graph that returns only tensors (reach='output')", f"{node.name} is not a tensor"
            raise mismatch_error(match, Cause.REACH, expected, found, node)
        if any(map(depends_on_data, value_of(node).shape)):
            expected = "outputs whose sizes follow from those of the inputs (reach='output')"
            raise mismatch_error(match, Cause.REACH, expected, describe(node), node)


def _roles(supplied: list[fx.Node]) -> Mapping[str, fx.Node]:
    if len(supplied) == 1:
        return {"output": supplied[0]}
    return {f"output_{i}": node for i, node in enumerate(supplied)}
