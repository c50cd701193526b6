"""The order of the tuple that a block returns, read from its source. The graph does not show this order."""

from __future__ import annotations

import ast
import inspect
import textwrap

from cachedit_fx.patterns.nodes import SourceLine


def return_names(cls: type | None) -> tuple[str | None, ...]:
    """Names in the last return statement of `cls.forward`; None for an element that is not a plain name.

    Empty if the source is not available, or if the returned expression is neither a tuple display nor a name.
    """
    value, _ = _last_return(cls)
    if isinstance(value, ast.Tuple):
        return tuple(element.id if isinstance(element, ast.Name) else None for element in value.elts)
    return (value.id,) if isinstance(value, ast.Name) else ()


def return_line(cls: type | None) -> SourceLine | None:
    """The line of the last return statement of `cls.forward`; None if the source is not available."""
    return _last_return(cls)[1]


def _last_return(cls: type | None) -> tuple[ast.expr | None, SourceLine | None]:
    """The expression that the last return statement of `cls.forward` returns, and the line of this statement."""
    try:
        function = inspect.unwrap(cls.forward)  # type: ignore[union-attr]
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return None, None
    found = [node for node in ast.walk(tree.body[0]) if isinstance(node, ast.Return) and node.value is not None]
    if not found:
        return None, None
    last = max(found, key=lambda node: node.lineno)
    return last.value, SourceLine(str(inspect.getsourcefile(function)), first + last.lineno - 1)


def return_order(cls: type | None, labels: dict[str, str]) -> tuple[str, ...]:
    """Roles in the order in which `cls.forward` returns them.

    Args:
        labels: Role -> its name in the model's code.

    Returns:
        Every role of `labels`, ordered; empty if the source does not show the order. One name may be unknown: it
        belongs to the one role that is left.
    """
    names = return_names(cls)
    if len(names) != len(labels):
        return ()
    by_name = {name: role for role, name in labels.items()}
    roles = [by_name.get(name) if name is not None else None for name in names]
    missing = [role for role in labels if role not in roles]
    if roles.count(None) > 1 or len(set(roles)) != len(roles):
        return ()
    return tuple(role if role is not None else missing[0] for role in roles)
