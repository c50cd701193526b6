"""Work before a region that nothing but its blocks reads is done with them, so that a reused step leaves it out.

block 0:  image, text -> image', text'          only the region reads text'
->        head makes image', and what text' is made of; compute makes text' from that
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import fx

from cachedit_fx.passes.contexts import is_context, within_contexts
from cachedit_fx.passes.cut import Region
from cachedit_fx.passes.dataflow import Program
from cachedit_fx.passes.inplace import is_in_place
from cachedit_fx.patterns.chain import is_tensor, value_of


def defer_work(program: Program, regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions, each with the nodes from before it that it takes in.

    Nothing is deferred past a node that writes in place: it might write into what is read later.
    """
    taken = {node for region in regions for node in (*region.nodes, *region.hoisted)}
    fixed = set(within_contexts(program.nodes))
    found = []
    for region in regions:
        inside, kept = set(region.nodes), _read_by_reuse(region) | taken | fixed
        deferred: list[fx.Node] = []

        def is_free(node: fx.Node, kept: set[fx.Node] = kept) -> bool:
            return _computes(node) and node not in kept and not is_context(node)

        for node in reversed(program.nodes[: program.position[region.nodes[0]]]):
            if is_in_place(node):
                break
            if is_free(node) and all(user in inside for user in node.users) and _is_whole(node, inside, is_free):
                inside.add(node)
                deferred.append(node)
        # Moving about what is nearly free would cost a piece more than it saves.
        if any(program.flops[program.position[node]] for node in deferred):
            taken.update(deferred)
            region = replace(region, deferred=tuple(reversed(deferred)))
        found.append(region)
    return tuple(found)


def _computes(node: fx.Node) -> bool:
    is_call = node.op in ("call_function", "call_method")
    return is_call and (is_tensor(node) or isinstance(value_of(node), tuple | list)) and bool(node.users)


def _is_whole(node: fx.Node, inside: set[fx.Node], is_free: Callable[[fx.Node], bool]) -> bool:
    """Whether no tuple is cut off from its parts: only tensors pass between pieces."""
    for made in node.all_input_nodes:
        if made.op in ("call_function", "call_method") and isinstance(value_of(made), tuple | list):
            parts = list(made.users)
            ends = all(part in inside or (is_free(part) and inside.issuperset(part.users)) for part in parts)
            if not ends or not is_free(made):
                return False
    return True


def _read_by_reuse(region: Region) -> set[fx.Node]:
    """What a reused step needs besides what is kept, or the guard to decide."""
    read: set[fx.Node] = {node for node in (region.looked_at, region.looked_from) if node is not None}
    for pair in region.carried:
        read |= {pair.before} if pair.before is not None else set()
        if pair.replay is not None:
            read |= _inputs_of(node for step in pair.replay.steps for node in step if node is not None)
    return read


def _inputs_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {found for node in nodes for found in (node, *node.all_input_nodes)}
