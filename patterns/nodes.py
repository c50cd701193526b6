"""The value, shape, name and source line of a node of a captured graph."""

from __future__ import annotations

import linecache
import re
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from cachedit_fx.patterns.names import without_number


class SourceLine(NamedTuple):
    """A line of the user's code."""

    path: str
    line: int

    @property
    def text(self) -> str:
        """The line itself; empty if the file is not available."""
        return shorten(linecache.getline(self.path, self.line).strip(), 160, placeholder=" ...")

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def base_name(node: fx.Node) -> str:
    """The local variable that Dynamo named `node` after: `hidden_states` for `hidden_states_47`."""
    if "cachedit_name" in node.meta:  # A name that a patch functor assigned.
        return str(node.meta["cachedit_name"])
    info = node.meta.get("cachedit_input")
    return info.name if info is not None else without_number(node.name)


def value_of(node: fx.Node) -> Any:
    """What the node returned during capture: a fake tensor, a SymInt, a tuple of these; None if it is unknown."""
    return node.meta.get("example_value")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def size_key(size: Any) -> object:
    """A size that can be compared without adding a guard: an int, or the expression of a symbolic size."""
    return size if isinstance(size, int) else getattr(getattr(size, "node", None), "expr", size)


def shape_key(node: fx.Node) -> tuple[object, ...]:
    """Shape, dtype and device of a tensor node. Tensors with equal keys can be added without broadcasting."""
    value = value_of(node)
    return (*(size_key(s) for s in value.shape), value.dtype, value.device)


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensor nodes are known, without adding a guard, to have the same shape, dtype and device."""
    if shape_key(one) == shape_key(other):
        return True
    a, b = value_of(one), value_of(other)
    if a.dim() != b.dim() or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return all(
        size_key(x) == size_key(y) or statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True)
    )


def may_share_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensor nodes have the same dtype and device, and no size that is known to differ.

    A size that depends on data (such as the number of tokens under a mask) is unknown before the call. Two sizes that
    are different expressions of input sizes (`n` and `n // t * t`) may be equal if they were equal in the traced call.
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
    """Whether a size depends on values of tensors (a symbol such as `u0`), not only on the sizes of the inputs."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def describe(node: fx.Node) -> str:
    """`hidden_states_29 float32[2, 16, 32]`, for messages."""
    return f"{node.name} {dtype_and_shape(node)}" if is_tensor(node) else node.name


def dtype_and_shape(node: fx.Node) -> str:
    """`float32[2, 16, 32]` for a tensor node, for messages."""
    value = value_of(node)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def call_text(node: fx.Node) -> str:
    """`iadd_1 = iadd(hidden_states_3, mul_4)`, for messages."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    arguments = (*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items()))
    return f"{node.name} = {target}({', '.join(arguments)})"


def source_line(node: fx.Node | None) -> SourceLine | None:
    """The line of the user's code that created the node; None if Dynamo recorded no stack."""
    trace = node.meta.get("stack_trace") if node is not None else None
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    return SourceLine(frames[-1][0], int(frames[-1][1])) if frames else None
