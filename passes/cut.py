"""Where the chain is cut: Fn and Bn turn into regions; what enters one is paired with what leaves it. Reads only.

    head: ... blocks[:Fn]  |  region: blocks[Fn : N - Bn]  |  tail: blocks[N - Bn :] ...

Work between two blocks belongs to the block before it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from cachedit_fx.config import CacheConfig, CacheType, Changes
from cachedit_fx.passes.contexts import is_context, setter_at, within_contexts
from cachedit_fx.passes.dataflow import Program
from cachedit_fx.passes.inplace import is_in_place, written_between, written_outside
from cachedit_fx.passes.replay import Replay, replay_joins
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.chain import (
    HIDDEN,
    Block,
    call_text,
    depends_on_data,
    describe,
    is_tensor,
    may_share_shape,
    same_shape,
    shape_key,
    source_line,
    value_of,
)
from cachedit_fx.patterns.mismatch import Match, Mismatch


@dataclass(frozen=True, slots=True)
class Carried:
    """A value that leaves a region and is needed after it.

    Attributes:
        role: The stream's role, or the node's name for a value that continues no stream.
        before: The stream where it enters the region; None if the value is cached as it is.
        after: The node that makes it, in the region.
        replay: How `before` follows from the streams at the cut, where lists are joined behind it; None: it is there.
    """

    role: str
    before: fx.Node | None
    after: fx.Node
    replay: Replay | None = None

    @property
    def is_measured(self) -> bool:
        """Whether only the tensors themselves tell that the stream keeps its shape: its sizes depend on data."""
        if self.before is None:
            return False
        sizes = (*value_of(self.before).shape, *value_of(self.after).shape)
        return not same_shape(self.before, self.after) or any(map(depends_on_data, sizes))


@dataclass(frozen=True, slots=True)
class Region:
    """The blocks between two cuts, and all that a guard needs to know of them.

    Attributes:
        name: As in `transformer_blocks[1:4]`; two lists are joined by `+`.
        first, last: Numbers of the chain's first block in the region and the first after it.
        nodes: The region's nodes in program order.
        own: What of the configuration is for this region alone.
        looked_at: What the guard looks at: the hidden stream behind the Fn blocks, or in front of a single block.
            None: nothing is looked at.
        looked_from: What is taken off it first: the hidden stream before the Fn blocks; None to look at the value.
        carried: What a reused step has to supply.
        hoisted: Nodes that lie between the cuts but depend on no stream: they run with the head, at every step.
        deferred: Nodes from before the first cut that nothing but `nodes` reads: they run with these.
    """

    name: str
    first: int
    last: int
    nodes: tuple[fx.Node, ...]
    own: Changes | None
    looked_at: fx.Node | None
    looked_from: fx.Node | None
    carried: tuple[Carried, ...]
    hoisted: tuple[fx.Node, ...]
    deferred: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Lists of the chain that follow each other and are decided about by one configuration.

    Attributes:
        own: What this group's regions do differently from the whole model's configuration; `config` includes it.
        number: Of its first block in the chain.
    """

    matches: tuple[Match, ...]
    config: CacheConfig
    own: Changes | None = None
    number: int = 0

    @property
    def blocks(self) -> list[Block]:
        return [block for match in self.matches for block in match.blocks.blocks]

    @property
    def paths(self) -> str:
        return "+".join(match.blocks.path for match in self.matches)


def cut_regions(program: Program, groups: Sequence[Group]) -> tuple[Region, ...] | Mismatch:
    """The regions of every group: its middle blocks, or where blocks are pruned each of them on its own."""
    regions: list[Region] = []
    for group in groups:
        miss = _check_blocks(group)
        if miss is not None:
            return miss
        prune = group.config.cache_type == CacheType.DBPrune
        cut = _cut_every(program, group) if prune else _cut_middle(program, group)
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
        return _miss(partial, Cause.NO_CHAIN, detail)
    return None


def _cut_middle(program: Program, group: Group) -> list[Region] | Mismatch:
    fn, last = group.config.Fn_compute_blocks, len(group.blocks) - group.config.Bn_compute_blocks
    if fn == 0:
        found = _cut(program, group, 0, last, None, None)
        return found if isinstance(found, Mismatch) else [found]
    looked = _residual_over(group, fn)
    if looked is None:
        start = _boundaries(group)[0][HIDDEN]
        detail = f"expected Fn blocks that keep the shape of a stream, found that they change that of {describe(start)}"
        return _miss(group.matches[0], Cause.UNPAIRED, detail)
    found = _cut(program, group, fn, last, *looked)
    return found if isinstance(found, Mismatch) else [found]


def _residual_over(group: Group, fn: int) -> tuple[fx.Node, fx.Node] | None:
    """The hidden stream after the Fn blocks, and before as many of them as keep its shape.

    Two lists may be joined by a `cat` of text and image. If the Fn blocks end there, it is the image as the
    first list left it; if they reach into the second list, the residual is that over its blocks.
    """
    streams = _boundaries(group)
    ends = [match.blocks.boundaries[-1].get(HIDDEN) for match, stop in _with_ends(group) if stop == fn]
    for after in (streams[fn][HIDDEN], *ends):
        befores = [stream[HIDDEN] for stream in streams[:fn]]
        # Where sizes only were equal, taking the residual makes it a guard of the graph that they are.
        alike = (
            node for fits in (same_shape, _had_one_shape) for node in befores if after is not None and fits(node, after)
        )
        before = next(alike, None)
        if before is not None and after is not None:
            return after, before
    return None


def _had_one_shape(one: fx.Node, other: fx.Node) -> bool:
    sizes = (*value_of(one).shape, *value_of(other).shape)
    return may_share_shape(one, other) and not any(map(depends_on_data, sizes))


def _with_ends(group: Group) -> list[tuple[Match, int]]:
    """Each list with the number of the first block after it."""
    counts = itertools.accumulate(len(match.blocks.blocks) for match in group.matches)
    return list(zip(group.matches, counts, strict=True))


def _cut_every(program: Program, group: Group) -> list[Region] | Mismatch:
    """One region per block that may be pruned. One that can't be cut on its own is always computed."""
    config, streams = group.config, _boundaries(group)
    regions: list[Region] = []
    misses: list[Mismatch] = []
    for i in range(config.Fn_compute_blocks, len(group.blocks) - config.Bn_compute_blocks):
        if i in config.non_prune_block_ids:
            continue
        found = _cut(program, group, i, i + 1, streams[i][HIDDEN], None)
        if isinstance(found, Region):
            regions.append(found)
        else:
            misses.append(found)
    if regions:
        return regions
    detail = f"expected a block of {group.paths} that may be pruned, found all among non_prune_block_ids"
    return misses[0] if misses else _miss(group.matches[0], Cause.TOO_FEW_BLOCKS, detail)


def _cut(
    program: Program, group: Group, first: int, last: int, looked_at: fx.Node | None, looked_from: fx.Node | None
) -> Region | Mismatch:
    """The region of the group's blocks `first` to `last` (exclusive)."""
    blocks, streams, match = group.blocks, _boundaries(group), group.matches[0]
    is_end = last == len(blocks)
    start, stop = blocks[first].start, blocks[-1].end if is_end else blocks[last].start
    before, after = streams[first], streams[last]
    nodes = [n for n in program.born(start, stop)]
    if is_end:
        nodes += _undo_joins(program, before, after, nodes)
    inside = set(nodes)
    made = _made_of(program, set(before.values()), blocks[first], stop) | (inside - set(program.nodes[start:stop]))
    leaving = [n for n in nodes if any(user not in inside for user in n.users)]
    sunk = _made_again(program, made, leaving, _values(group, after))
    needed = [n for n in leaving if n not in made] + [arg for n in sunk for arg in n.all_input_nodes if arg not in made]
    hoisted = _behind([n for n in needed if n in inside], inside)
    nodes = [n for n in nodes if n not in hoisted and n not in sunk]
    leaving = [n for n in leaving if n in made and n not in sunk]
    carried = _pair(group, before, after, leaving)
    carried = _rejoin(program, group, first, last, before, carried)
    miss = _check_state(program, match, (start, stop), hoisted)
    if miss is None:  # A miss is falsy.
        miss = _check(program, match, looked_from, before, carried, nodes)
    if miss is not None:
        return miss
    return Region(
        name=_name(group, first, last), first=group.number + first, last=group.number + last, nodes=tuple(nodes),
        own=group.own, looked_at=looked_at, looked_from=looked_from,
        carried=tuple(carried), hoisted=tuple(n for n in program.nodes if n in hoisted),
    )  # fmt: skip


def _boundaries(group: Group) -> list[Mapping[str, fx.Node]]:
    """Streams before every block of the chain, and after the last. Where two lists meet, the later one's entry."""
    streams: list[Mapping[str, fx.Node]] = []
    for match in group.matches:
        streams = [*streams[:-1], *match.blocks.boundaries]
    return streams


def _made_of(program: Program, streams: set[fx.Node], block: Block, stop: int) -> set[fx.Node]:
    """What is made of the streams from `block` on, or of what they were made into for it (`norm(x)`)."""
    earliest = min(map(program.position.__getitem__, streams))
    before = program.descendants_within(streams, earliest, block.start)
    entered = before & set(program.read_from_before(block.start, block.end))
    return program.descendants_within(streams | entered, block.start, stop)


def _values(group: Group, after: Mapping[str, fx.Node]) -> set[fx.Node]:
    """Streams that the template wants to be kept as they are."""
    kinds = {**group.matches[0].template.cached, **group.matches[-1].template.cached}
    return {node for role, node in after.items() if kinds.get(role) == "value"}


def _made_again(program: Program, made: set[fx.Node], leaving: list[fx.Node], values: set[fx.Node]) -> set[fx.Node]:
    """What leaves the region and follows from all else that does, at no cost: it is made again behind the region.

    As `norm(x)` beside `x`, where the loop norms what its blocks read.
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


def _undo_joins(
    program: Program, before: Mapping[str, fx.Node], after: Mapping[str, fx.Node], nodes: list[fx.Node]
) -> list[fx.Node]:
    """Slices behind the chain that take a stream out of a joined one again; they join the region."""
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


def _behind(nodes: list[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    found, todo = set(nodes), list(nodes)
    while todo:
        fresh = [arg for arg in todo.pop().all_input_nodes if arg in inside and arg not in found]
        found.update(fresh)
        todo.extend(fresh)
    return found


def _pair(
    group: Group, before: Mapping[str, fx.Node], after: Mapping[str, fx.Node], leaving: list[fx.Node]
) -> list[Carried]:
    """Each value that leaves the region, with the stream that it continues: that of its role, else of its shape."""
    kinds = {**group.matches[0].template.cached, **group.matches[-1].template.cached}
    role_of = {node: role for role, node in after.items()}
    free = dict(before)
    partner: dict[fx.Node, str] = {}
    for node in leaving:  # By role first, so that a look-alike cannot take a stream's partner away.
        role = role_of.get(node, "")
        if role in free and is_tensor(node) and may_share_shape(free[role], node):
            partner[node] = role
            del free[role]
    for node in leaving:  # A stream under another role, or the slice that undoes a join.
        if node not in partner and is_tensor(node) and (node in role_of or node.target is operator.getitem):
            fits = [role for role in free if same_shape(free[role], node)]
            if len(fits) == 1:
                partner[node] = fits[0]
                del free[fits[0]]
    pairs = []
    for node in leaving:
        role = partner.get(node, role_of.get(node, node.name))
        is_residual = node in partner and kinds.get(role) != "value"
        pairs.append(Carried(role, before[role] if is_residual else None, node))
    return pairs


def _rejoin(
    program: Program, group: Group, first: int, last: int, before: Mapping[str, fx.Node], carried: list[Carried]
) -> list[Carried]:
    """Streams that continue none at the first cut, against what the lists between the cuts would make of those."""
    lists = [(match.blocks, stop) for match, stop in _with_ends(group)]
    meetings = [
        (one.boundaries[-1], other.boundaries[0])
        for (one, stop), (other, _) in itertools.pairwise(lists)
        if first < stop <= last
    ]
    if not meetings:
        return carried
    joined = replay_joins(program, group.blocks[first].start, before, meetings)
    found = []
    for pair in carried:
        entry, replay = joined.get(pair.role, (None, None))
        kind = {**group.matches[0].template.cached, **group.matches[-1].template.cached}.get(pair.role)
        if pair.before is None and kind != "value" and entry is not None and same_shape(entry, pair.after):
            pair = Carried(pair.role, entry, pair.after, replay)
        found.append(pair)
    return found


def _check_state(program: Program, match: Match, cuts: tuple[int, int], hoisted: set[fx.Node]) -> Mismatch | None:
    """Nothing may run in another state than in the model: neither what moves to the head, nor what follows a cut."""
    moved = next(iter(hoisted & within_contexts(program.nodes)), None) if hoisted else None
    if moved is not None:
        detail = f"expected {moved.name}, which does not depend on a stream, to be made outside a context as autocast"
        return _miss(match, Cause.STATE, detail, moved)
    setter = next(filter(None, (setter_at(program.nodes, cut) for cut in cuts)), None)
    if setter is not None:
        detail = f"expected blocks that begin and end in one state, found `{call_text(setter)}` between two of them"
        return _miss(match, Cause.STATE, detail, setter)
    return None


def _check(
    program: Program,
    match: Match,
    looked_from: fx.Node | None,
    before: Mapping[str, fx.Node],
    carried: list[Carried],
    nodes: list[fx.Node],
) -> Mismatch | None:
    for pair in carried:
        if not is_tensor(pair.after):
            detail = f"expected only tensors to leave the region, found {pair.after.name}"
            return _miss(match, Cause.DYNAMIC, detail, pair.after)
        if pair.is_measured and pair.replay is not None:
            detail = f"expected streams of known sizes where lists are joined, found {describe(pair.after)}"
            return _miss(match, Cause.DYNAMIC, detail, pair.after)
    valued = {role for role, kind in match.template.cached.items() if kind == "value"}
    if not any(pair.before is not None or pair.role in valued for pair in carried):
        detail = (
            f"expected a stream that leaves the region as it entered ({', '.join(map(describe, before.values()))}), "
            f"found {', '.join(describe(pair.after) for pair in carried) or 'nothing that is used after it'}"
        )
        return _miss(match, Cause.UNPAIRED, detail, carried[0].after if carried else None)
    first, region = match.blocks.blocks[0].start, program.position[nodes[0]]
    written = written_outside(program, nodes)
    if looked_from is not None:
        written = written or written_between(program, looked_from, first, region)
    if written is not None:
        detail = f"expected streams that nothing writes into in place, found `{call_text(written)}`"
        return _miss(match, Cause.IN_PLACE, detail, written)
    return None


def _name(group: Group, first: int, last: int) -> str:
    parts, offset = [], 0
    for match in group.matches:
        count = len(match.blocks.blocks)
        low, high = max(0, first - offset), min(count, last - offset)
        if low < high:
            part = f"[{low}]" if group.config.cache_type == CacheType.DBPrune else f"[{low}:{high}]"
            parts.append(match.blocks.path + ("" if (low, high) == (0, count) else part))
        offset += count
    return "+".join(parts)


def _miss(match: Match, cause: Cause, detail: str, node: fx.Node | None = None) -> Mismatch:
    total = len(match.blocks.blocks)
    return Mismatch(
        match.template, cause, detail, node.name if node is not None else None, source_line(node), total, total
    )
