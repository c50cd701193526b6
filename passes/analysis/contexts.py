"""Which nodes enter, leave, or lie in a context such as autocast, and which set a state. Reads only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from cachedit_fx.patterns.nodes import is_tensor


def is_context(node: fx.Node) -> bool:
    """Whether the node enters or leaves a context."""
    return exit_of(node) is not None or entered_by(node) is not None


def within_contexts(nodes: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """Those of a graph's nodes that do something different outside the context that they lie in."""
    depth, found = 0, []
    for node in nodes:
        if entered_by(node) is not None:
            depth -= 1
        elif exit_of(node) is not None:
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


def exit_of(node: fx.Node) -> fx.Node | None:
    """The node that leaves the context that this node enters; None if it enters none."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith("_enter_"):
        return None
    return next((user for user in node.users if entered_by(user) is node), None)


def entered_by(node: fx.Node) -> fx.Node | None:
    """The node that enters the context that this node leaves; None if it leaves none."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith("_exit_"):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
