"""Exits every context at the end of a block and enters it again in the next block, so that no cut lies in a context.

    enter, [block 0], [block 1], exit    ->    enter, [block 0], exit, enter, [block 1], exit

Dynamo writes `with torch.autocast(...)` as two nodes that read no tensor and belong to no module. What is skipped or
compiled separately must begin and end in the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.analysis.contexts import entered_by, exit_of, is_context
from cachedit_fx.passes.analysis.module_calls import module_path
from cachedit_fx.passes.graph_pass import GraphPass


class NarrowContexts(GraphPass):
    """Narrows all contexts, which may be nested, to single blocks and to the work between two blocks."""

    name = "narrow-contexts"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        pairs = _contexts(graph_module)
        for enter, leave in reversed(pairs):  # Inner contexts first: each of their parts then lies in one outer part.
            _narrow(enter, leave)
        return PassResult(graph_module, bool(pairs))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        for enter, leave in _contexts(graph_module):
            blocks = set(map(_block_of, _computing(enter, leave)))
            assert len(blocks) <= 1, f"the context that {enter} enters contains nodes of {len(blocks)} blocks"


def _contexts(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that enter and leave each context."""
    return [(enter, leave) for enter in gm.graph.nodes if (leave := exit_of(enter)) is not None]


def _computing(enter: fx.Node, leave: fx.Node) -> list[fx.Node]:
    """The nodes in a context, those that enter and leave inner contexts excluded."""
    inside = []
    node = enter.next
    while node is not leave:
        inside.append(node)
        node = node.next
    return [node for node in inside if not is_context(node)]


def _narrow(enter: fx.Node, leave: fx.Node) -> None:
    computing = _computing(enter, leave)
    if not computing:
        return
    opened = [enter]
    for first, node in itertools.pairwise(computing):
        if _block_of(first) != _block_of(node):
            # An inner context ends before the boundary or begins after it.
            before = first.next
            while entered_by(before) is not None:
                before = before.next
            with enter.graph.inserting_before(before):
                closing = enter.graph.node_copy(leave, lambda arg: opened[-1] if arg is enter else arg)
                opening = enter.graph.node_copy(enter)
            _belongs_with(closing, first)
            _belongs_with(opening, node)
            opened.append(opening)
    _belongs_with(enter, computing[0])
    _belongs_with(leave, computing[-1])
    leave.args = (opened[-1], *leave.args[1:])


def _belongs_with(context: fx.Node, node: fx.Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        context.meta.pop(key, None)
        if key in node.meta:
            context.meta[key] = node.meta[key]


def _block_of(node: fx.Node) -> Hashable:
    """The outermost numbered module of the node, and the number of its call; None for work between blocks."""
    for key, (raw, _) in (node.meta.get("nn_module_stack") or {}).items():
        path = module_path(raw)
        for end, name in enumerate(path, 1):
            if name[-1].isdigit():
                return path[:end], key.partition("@")[2]
    return None
