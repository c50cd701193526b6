"""The values that leave a region, and the stream that each of them continues."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping

from torch import fx

from cachedit_fx.passes.analysis.contexts import is_context
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.joined_streams import find_stream_joins
from cachedit_fx.passes.analysis.writes import is_in_place
from cachedit_fx.passes.region import Group, LiveOut
from cachedit_fx.patterns.blocks import Block
from cachedit_fx.patterns.nodes import is_tensor, may_share_shape, same_shape, shape_key, value_of


def made_of(program: Program, streams: set[fx.Node], block: Block, stop: int) -> set[fx.Node]:
    """The nodes from `block` to `stop` that depend on the streams, or on a value derived from them (`norm(x)`) that
    enters the block."""
    earliest = min(map(program.position.__getitem__, streams))
    before = program.descendants_within(streams, earliest, block.start)
    entered = before & set(program.read_from_before(block.start, block.end))
    return program.descendants_within(streams | entered, block.start, stop)


def values_of(group: Group, after: Mapping[str, fx.Node]) -> set[fx.Node]:
    """The streams that the template declares to be cached as values."""
    return {node for role, node in after.items() if group.kinds.get(role) == "value"}


def rematerialized(program: Program, made: set[fx.Node], leaving: list[fx.Node], values: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are rematerialized after the region: they follow without FLOPs from the other live-outs.

    For example `norm(x)`, if `x` leaves the region as well.

    Args:
        made: The nodes that depend on the streams.
        leaving: The nodes that are used after the region, in program order.
        values: Streams that are cached as values. They are never rematerialized.
    """
    out = {node for node in leaving if node in made}
    sunk: set[fx.Node] = set()
    for node in reversed(leaving):
        given = [arg for arg in node.all_input_nodes if arg in made]
        is_free = not program.flops[program.position[node]] and not is_in_place(node) and not is_context(node)
        is_last = not any(user in made and user not in sunk for user in node.users)
        if node in out and is_free and is_last and given and node not in values and all(arg in out for arg in given):
            out.discard(node)
            sunk.add(node)
    return sunk


def undo_joins(
    program: Program, before: Mapping[str, fx.Node], after: Mapping[str, fx.Node], nodes: list[fx.Node]
) -> list[fx.Node]:
    """The slices after the chain that take one stream out of a joined stream. They become part of the region."""
    extra: list[fx.Node] = []
    shapes = {shape_key(node) for node in before.values()}
    for node in after.values():
        current, passed = node, []
        while shape_key(current) not in shapes and len(current.users) == 1:
            current = next(iter(current.users))
            if current.target is not operator.getitem or not is_tensor(current):
                break
            passed.append(current)
            if shape_key(current) in shapes:
                extra += passed
    return sorted(extra, key=program.position.__getitem__)


def behind(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """`nodes`, and their ancestors in `inside`."""
    found, todo = set(nodes), list(nodes)
    while todo:
        fresh = [arg for arg in todo.pop().all_input_nodes if arg in inside and arg not in found]
        found.update(fresh)
        todo.extend(fresh)
    return found


def pair_streams(
    group: Group, before: Mapping[str, fx.Node], after: Mapping[str, fx.Node], leaving: list[fx.Node]
) -> list[LiveOut]:
    """The live-outs: each value that leaves the region, with the stream that has its role, or else its shape."""
    role_of = {node: role for role, node in after.items()}
    free = dict(before)
    partner: dict[fx.Node, str] = {}
    for node in leaving:  # Roles first: otherwise another value of the same shape could be paired with the stream.
        role = role_of.get(node, "")
        if role in free and is_tensor(node) and may_share_shape(free[role], node):
            partner[node] = role
            del free[role]
    for node in leaving:  # A stream with another role, or the slice that undoes a join.
        if node not in partner and is_tensor(node) and (node in role_of or node.target is operator.getitem):
            fits = [role for role in free if same_shape(free[role], node)]
            if len(fits) == 1:
                partner[node] = fits[0]
                del free[fits[0]]
    pairs = []
    for node in leaving:
        role = partner.get(node, role_of.get(node, node.name))
        is_residual = node in partner and group.kinds.get(role) != "value"
        pairs.append(LiveOut(role, before[role] if is_residual else None, node))
    return pairs


def rejoin(
    program: Program, group: Group, first: int, last: int, before: Mapping[str, fx.Node], live_outs: list[LiveOut]
) -> list[LiveOut]:
    """The live-outs, in which streams of a joined list are paired with the join of the streams at the first cut."""
    lists = [(match.blocks, stop) for match, stop in group.ends]
    meetings = [
        (one.boundaries[-1], other.boundaries[0])
        for (one, stop), (other, _) in itertools.pairwise(lists)
        if first < stop <= last
    ]
    if not meetings:
        return live_outs
    joined = find_stream_joins(program, group.blocks[first].start, before, meetings)
    found = []
    for pair in live_outs:
        entry, joins = joined.get(pair.role, (None, None))
        is_residual = pair.before is None and group.kinds.get(pair.role) != "value"
        if is_residual and entry is not None and same_shape(entry, pair.after):
            pair = LiveOut(pair.role, entry, pair.after, joins)
        found.append(pair)
    return found


def with_parts(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """`nodes`, and for each tuple among them the nodes in `inside` that read its elements. Only tensors cross a cut."""
    found = set(nodes)
    for node in list(found):
        if isinstance(value_of(node), tuple | list):
            found.update(user for user in node.users if user in inside and user.target is operator.getitem)
    return found
