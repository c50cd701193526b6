"""What the return statement of a block shows, read from its source: the order of a tuple, the names in a dict.

The graph shows neither.
"""

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


def return_keys(cls: type | None) -> dict[str, bool]:
    """Names under which `cls.forward` returns new values in a container -> whether they are computed in this order.

    The container is a dict (`return {**state, "img": img}`), a call with keyword arguments (of `dict`, of a dataclass
    or of a named tuple), or a variable whose items or attributes are set (`state["img"] = ...; return state`). Values
    that are taken from another object as they are (`state["temb"]`) are left out. A value that has been computed
    before is False. Empty if there is no such container, or if the source is not available.
    """
    value, _ = _last_return(cls)
    pairs: list[tuple[object, ast.expr]] = []
    if isinstance(value, ast.Dict):
        pairs = [(getattr(key, "value", None), item) for key, item in zip(value.keys, value.values, strict=True)]
    elif isinstance(value, ast.Call):
        pairs = [(keyword.arg, keyword.value) for keyword in value.keywords]
    elif isinstance(value, ast.Name):
        tree, _ = _source_of(cls)
        pairs = _assignments(tree, value.id) if tree is not None else []
    return {
        key: not isinstance(item, ast.Name)
        for key, item in pairs
        if isinstance(key, str) and not isinstance(item, ast.Subscript | ast.Attribute)
    }


def _assignments(tree: ast.stmt, name: str) -> list[tuple[object, ast.expr]]:
    """The items and attributes of the variable `name` that are set, with the last values, in the order of the code."""
    found: list[tuple[int, object, ast.expr]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        (target,) = node.targets
        holder = getattr(target, "value", None)
        if isinstance(holder, ast.Name) and holder.id == name:
            key = target.attr if isinstance(target, ast.Attribute) else getattr(target.slice, "value", None)  # type: ignore[attr-defined]
            found.append((node.lineno, key, node.value))
    last = {key: (line, value) for line, key, value in sorted(found, key=lambda one: one[0])}
    return [(key, value) for key, (_, value) in sorted(last.items(), key=lambda one: one[1][0])]


def return_line(cls: type | None) -> SourceLine | None:
    """The line of the last return statement of `cls.forward`; None if the source is not available."""
    return _last_return(cls)[1]


def _last_return(cls: type | None) -> tuple[ast.expr | None, SourceLine | None]:
    """The expression that the last return statement of `cls.forward` returns, and the line of this statement."""
    tree, start = _source_of(cls)
    if tree is None or start is None:
        return None, None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    if not found:
        return None, None
    last = max(found, key=lambda node: node.lineno)
    return last.value, SourceLine(start.path, start.line + last.lineno - 1)


def _source_of(cls: type | None) -> tuple[ast.stmt | None, SourceLine | None]:
    """The definition of `cls.forward`, and the line at which it begins; None if the source is not available."""
    try:
        function = inspect.unwrap(cls.forward)  # type: ignore[union-attr]
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        return tree.body[0], SourceLine(str(inspect.getsourcefile(function)), first)
    except (OSError, TypeError, AttributeError, SyntaxError):
        return None, None


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
