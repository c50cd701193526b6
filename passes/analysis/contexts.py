"""Which nodes enter, exit, or lie in a context such as autocast, and which set a state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from cachedit_fx.passes.analysis.op_tables import ENTER_PREFIX, EXIT_PREFIX, STATELESS_PREFIXES
from cachedit_fx.patterns.nodes import is_tensor


def is_context(node: fx.Node) -> bool:
    """Whether the node enters or exits a context."""
    return exit_of(node) is not None or entered_by(node) is not None


def within_contexts(nodes: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """The nodes of a graph that lie in a context, and may compute something else outside of it."""
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
    """A node next to a cut that sets a state for everything after it, as `sdpa_kernel` does; None if there is none.

    It is not known whether such a node belongs to the block before the cut or to the block after it.
    """
    before = itertools.takewhile(_makes_no_tensor, reversed(nodes[:position]))
    behind = itertools.takewhile(_makes_no_tensor, nodes[position:])
    return next(filter(sets_state, itertools.chain(before, behind)), None)


def _makes_no_tensor(node: fx.Node) -> bool:
    return node.op in ("call_function", "get_attr") and not is_tensor(node)


def sets_state(node: fx.Node) -> bool:
    """Whether the node may set a state: it reads no tensor, returns nothing that is used, and is not a known check."""
    is_harmless = getattr(node.target, "__name__", "").startswith(STATELESS_PREFIXES) or is_context(node)
    return (
        node.op == "call_function"
        and not node.users
        and not any(map(is_tensor, node.all_input_nodes))
        and not is_harmless
    )


def exit_of(node: fx.Node) -> fx.Node | None:
    """The node that exits the context that this node enters; None if it enters none."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith(ENTER_PREFIX):
        return None
    return next((user for user in node.users if entered_by(user) is node), None)


def entered_by(node: fx.Node) -> fx.Node | None:
    """The node that enters the context that this node exits; None if it exits none."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith(EXIT_PREFIX):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
