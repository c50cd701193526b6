"""Closes every context at the end of a block and opens it again in the next, so that a cut never lies in one.

    enter, [block 0], [block 1], exit    ->    enter, [block 0], exit, enter, [block 1], exit

Dynamo writes `with torch.autocast(...)` as two nodes that read no tensor and belong to no module. What is skipped or
compiled apart must begin and end in the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from torch import fx

from cachedit_fx.passes.analysis.contexts import entered_by, exit_of, is_context
from cachedit_fx.passes.analysis.module_calls import module_path


def narrow_contexts(gm: fx.GraphModule) -> bool:
    """Returns whether anything changed. Contexts may be nested, as `with` statements are."""
    pairs = [(enter, leave) for enter in gm.graph.nodes if (leave := exit_of(enter)) is not None]
    for enter, leave in reversed(pairs):  # What lies inside first: its parts then lie in one part of what is around.
        _narrow(enter, leave)
    if pairs:
        gm.graph.lint()
        gm.recompile()
    return bool(pairs)


def _narrow(enter: fx.Node, leave: fx.Node) -> None:
    inside = []
    node = enter.next
    while node is not leave:
        inside.append(node)
        node = node.next
    computing = [node for node in inside if not is_context(node)]
    if not computing:
        return
    opened = [enter]
    for first, node in itertools.pairwise(computing):
        if _block_of(first) != _block_of(node):
            # An inner context ends before the boundary or begins behind it.
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
    """The outermost numbered module that the node belongs to, and which of its calls; None for work between blocks."""
    for key, (raw, _) in (node.meta.get("nn_module_stack") or {}).items():
        path = module_path(raw)
        for end, name in enumerate(path, 1):
            if name[-1].isdigit():
                return path[:end], key.partition("@")[2]
    return None
