"""Closes every context at the end of a block and opens it again in the next, so that a cut never lies in one.

    enter, [block 0], [block 1], exit    ->    enter, [block 0], exit, enter, [block 1], exit

Dynamo writes `with torch.autocast(...)` as two nodes that read no tensor and belong to no module. What is skipped or
compiled apart must begin and end in the same state.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from torch import fx

from cachedit_fx.passes.calls import module_path
from cachedit_fx.patterns.chain import is_tensor


def narrow_contexts(gm: fx.GraphModule) -> bool:
    """Returns whether anything changed. Contexts may be nested, as `with` statements are."""
    pairs = [(enter, leave) for enter in gm.graph.nodes if (leave := _exit_of(enter)) is not None]
    for enter, leave in reversed(pairs):  # What lies inside first: its parts then lie in one part of what is around.
        _narrow(enter, leave)
    if pairs:
        gm.graph.lint()
        gm.recompile()
    return bool(pairs)


def is_context(node: fx.Node) -> bool:
    """Whether the node enters or leaves a context."""
    return _exit_of(node) is not None or _entered_by(node) is not None


def within_contexts(nodes: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """Those of a graph's nodes that do something different outside the context that they lie in."""
    depth, found = 0, []
    for node in nodes:
        if _entered_by(node) is not None:
            depth -= 1
        elif _exit_of(node) is not None:
            depth += 1
        elif depth:
            found.append(node)
    return frozenset(found)


def setter_at(nodes: Sequence[fx.Node], position: int) -> fx.Node | None:
    """What sets a state for all that follows (as `sdpa_kernel` does) right where a cut would be.

    Nothing tells whether it belongs to the block before the cut or to the one behind it.
    """
    before = itertools.takewhile(_makes_no_tensor, reversed(nodes[:position]))
    behind = itertools.takewhile(_makes_no_tensor, nodes[position:])
    return next(filter(sets_state, itertools.chain(before, behind)), None)


def _makes_no_tensor(node: fx.Node) -> bool:
    return node.op in ("call_function", "get_attr") and not is_tensor(node)


def sets_state(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    is_harmless = name.startswith(("_assert", "_check", "_log", "_set_grad_enabled", "sym_")) or is_context(node)
    return (
        node.op == "call_function"
        and not node.users
        and not any(map(is_tensor, node.all_input_nodes))
        and not is_harmless
    )


def _exit_of(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith("_enter_"):
        return None
    return next((user for user in node.users if _entered_by(user) is node), None)


def _entered_by(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith("_exit_"):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


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
            while _entered_by(before) is not None:
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
