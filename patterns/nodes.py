"""What a node of a captured graph holds: its value, shape, name and source line."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true


def base_name(node: fx.Node) -> str:
    """The Python local that Dynamo named `node` after: `hidden_states_47` -> `hidden_states`; or a name given since."""
    if "cachedit_name" in node.meta:
        return str(node.meta["cachedit_name"])
    info = node.meta.get("cachedit_input")
    return info.name if info is not None else re.sub(r"_\d+$", "", node.name)


def value_of(node: fx.Node) -> Any:
    """What Dynamo saw the node return: a fake tensor, a SymInt, a tuple of these; None where it kept nothing."""
    return node.meta.get("example_value")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def size_key(size: Any) -> object:
    """A size that compares without adding a guard: an int, or the symbol's expression."""
    return size if isinstance(size, int) else getattr(getattr(size, "node", None), "expr", size)


def shape_key(node: fx.Node) -> tuple[object, ...]:
    """Shape, dtype and device of a tensor node; equal keys can be added elementwise without broadcasting."""
    value = value_of(node)
    return (*(size_key(s) for s in value.shape), value.dtype, value.device)


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensor nodes have one shape, dtype and device, as far as is known without adding a guard."""
    if shape_key(one) == shape_key(other):
        return True
    a, b = value_of(one), value_of(other)
    if a.dim() != b.dim() or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return all(
        size_key(x) == size_key(y) or statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True)
    )


def may_share_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensor nodes have one dtype and device, and no size that is known to differ.

    A size that depends on data (the number of tokens under a mask) is known to no one before the call. Two that are
    made of the inputs' sizes in different ways (`n` and `n // t * t`) may be equal if they were so at this call.
    """
    a, b = value_of(one), value_of(other)
    if a.dim() != b.dim() or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return all(
        size_key(x) == size_key(y) or depends_on_data(x) or depends_on_data(y) or _were_equal(x, y)
        for x, y in zip(a.shape, b.shape, strict=True)
    )


def _were_equal(one: Any, other: Any) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return False
    hints = [size if isinstance(size, int) else getattr(size.node, "hint", None) for size in (one, other)]
    return hints[0] is not None and hints[0] == hints[1]


def depends_on_data(size: Any) -> bool:
    """Whether a size is made of values that Dynamo captured (`u0`), not of the sizes of inputs alone."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def describe(node: fx.Node) -> str:
    """`hidden_states_29 float32[2, 16, 32]`, for messages."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return node.name
    return f"{node.name} {str(value.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in value.shape)}]"


def call_text(node: fx.Node) -> str:
    """`iadd_1 = iadd(hidden_states_3, mul_4)`, for messages."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    arguments = (*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items()))
    return f"{node.name} = {target}({', '.join(arguments)})"


def source_line(node: fx.Node | None) -> str:
    """`file.py:123` of the user's code that made the node; empty where Dynamo kept no stack."""
    trace = node.meta.get("stack_trace") if node is not None else None
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""
