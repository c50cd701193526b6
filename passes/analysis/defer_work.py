"""Finds the work before a region that only the region reads. It runs in the region, so a reused step does not do it.

block 0:  image, text -> image', text'          only the region reads text'
->        the head computes image' and the values that text' is computed from; the compute branch computes text'
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import fx

from cachedit_fx.passes.analysis.contexts import is_context
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.writes import is_in_place, storage_of, target_of
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.nodes import is_tensor, value_of


def defer_work(program: Program, regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions, each with its `deferred` nodes.

    A region that reaches to the output defers all nodes that can be deferred. Any other region defers the nodes that
    only its blocks read and that no write in place follows, because the write might change a value that they read.
    """
    taken = {node for region in regions for node in (*region.nodes, *region.hoisted)}
    read = {node for region in regions for node in _read_by_reuse(region)}
    start = max((program.position[region.nodes[0]] for region in regions if not region.reaches_output), default=0)
    writes = [position for position, node in enumerate(program.nodes[:start]) if is_in_place(node)]
    stays = read | taken | program.within_contexts  # Nodes that are not deferred.
    found = []
    for region in regions:
        if region.reaches_output:
            deferred = _all_before(program, region, taken, read)
        else:
            deferred = _read_by_blocks(program, region, stays, writes)
            # Deferring nodes that are nearly free would cost more than it saves.
            if not any(program.flops[program.position[node]] for node in deferred):
                deferred = ()
        taken.update(deferred)
        stays.update(deferred)
        found.append(replace(region, deferred=deferred))
    return tuple(found)


def _read_by_blocks(
    program: Program, region: Region, stays: set[fx.Node], writes: Sequence[int]
) -> tuple[fx.Node, ...]:
    """The nodes that only the region reads. `writes` are the positions of writes in place, in ascending order."""
    inside = set(region.nodes)
    deferred: list[fx.Node] = []
    stop = program.position[region.nodes[0]]
    before = bisect.bisect_left(writes, stop)
    start = writes[before - 1] + 1 if before else 0

    def is_free(node: fx.Node) -> bool:
        return _computes(node) and node not in stays and not is_context(node)

    def read_by(node: fx.Node) -> set[int]:
        return {position for arg in node.all_input_nodes if start <= (position := program.position[arg]) < stop}

    visited = {position for node in region.nodes for position in read_by(node)}
    todo = [-position for position in visited]  # The last one first, so that the readers of a node precede it.
    heapq.heapify(todo)
    while todo:
        node = program.nodes[-heapq.heappop(todo)]
        if is_free(node) and all(user in inside for user in node.users) and _is_whole(node, inside, is_free):
            inside.add(node)
            deferred.append(node)
            for position in read_by(node) - visited:
                visited.add(position)
                heapq.heappush(todo, -position)
    return tuple(reversed(deferred))


def _computes(node: fx.Node) -> bool:
    is_call = node.op in ("call_function", "call_method")
    return is_call and _makes_tensors(node) and bool(node.users)


def _makes_tensors(node: fx.Node) -> bool:
    return is_tensor(node) or isinstance(value_of(node), tuple | list)


def _is_whole(node: fx.Node, inside: set[fx.Node], is_free: Callable[[fx.Node], bool]) -> bool:
    """Whether every tuple and its parts stay together, because only tensors are passed between pieces."""
    for made in node.all_input_nodes:
        if made.op in ("call_function", "call_method") and isinstance(value_of(made), tuple | list):
            parts = list(made.users)
            ends = all(part in inside or (is_free(part) and inside.issuperset(part.users)) for part in parts)
            if not ends or not is_free(made):
                return False
    return True


def _read_by_reuse(region: Region) -> set[fx.Node]:
    """The nodes that a reused step or the decision needs, besides the cached values."""
    read: set[fx.Node] = {node for node in (region.probed_at, region.probed_since) if node is not None}
    for pair in region.live_outs:
        read |= {pair.before} if pair.before is not None else set()
        if pair.joins is not None:
            read |= _inputs_of(node for step in pair.joins.steps for node in step if node is not None)
    return read


def _inputs_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {found for node in nodes for found in (node, *node.all_input_nodes)}


def _all_before(program: Program, region: Region, taken: set[fx.Node], read: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes before the region that no other region, no conditional and no output needs."""
    inside = set(region.nodes)
    start = program.position[region.nodes[0]]
    free = {node for node in program.nodes_in(0, start) if node not in taken}
    # Other values than tensors are not passed between pieces, and may come from checks or set a state.
    stays = [node for node in free if not (_makes_tensors(node) or is_in_place(node) or is_context(node))]
    outside = [node for node in program.nodes if node not in inside and node not in free]
    needed = _closed(program, [*read, *stays, *outside], free)
    return tuple(node for node in program.nodes[:start] if node in free and node not in needed)


def _closed(program: Program, roots: Iterable[fx.Node], free: set[fx.Node]) -> set[fx.Node]:
    """The roots, and all nodes of `free` that must run where the roots do.

    These are the nodes that they are computed from, all writes into these, the parts of a tuple, and the other nodes of
    a context.
    """
    writes = _writes(program)
    context = _contexts(program)
    needed: set[fx.Node] = set()
    todo = [*roots, *writes[None]]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        parts = node.users if isinstance(value_of(node), tuple | list) else ()
        storage = storage_of(node)
        written = writes[storage] if storage is not None else []
        close = (*node.all_input_nodes, *parts, *written, *context.get(node, ()))
        todo += [other for other in close if other in free]
    return needed


def _writes(program: Program) -> defaultdict[int | None, list[fx.Node]]:
    """Storage -> the nodes that write into it in place. The key None is for unknown storages."""
    found: defaultdict[int | None, list[fx.Node]] = defaultdict(list)
    for node in filter(is_in_place, program.nodes):
        found[storage_of(target_of(node))].append(node)
    return found


def _contexts(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes of its context (such as autocast), enter and exit included. Adjacent contexts count as one."""
    within, run = program.within_contexts, list[fx.Node]()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.nodes:
        if node in within or is_context(node):
            run.append(node)
            found[node] = run
        else:
            run = []
    return found
