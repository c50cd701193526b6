"""What a template is matched against: the blocks that were found in a graph and the streams between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True, slots=True)
class Block:
    """The nodes that one transformer-block module call left in the graph.

    Attributes:
        path: Path of the module from the model, as in `transformer_blocks.3`.
        cls: The block's class, where Dynamo kept it.
        start: Position of its first node in program order; `end` is one past its last node.
        span_end: Where the next block starts (or `end`, for the last): work between blocks belongs to the one before.
    """

    path: str
    cls: type | None
    start: int
    end: int
    span_end: int


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of one module list, in execution order, and the streams at the places between them.

    Attributes:
        path: Path of the list, as in `transformer_blocks`.
        blocks: At least two.
        boundaries: For i = 0..n the streams just before block i (n: after the last), role -> node. Shorter than n + 1
            where the streams were lost; then `broken` says at which node and why.
        contexts: Invariants that every block reads and that look like a conditioning sequence: floating, at least
            [B, L, D], made from a conditioning input.
        emitted: What a block hands out beside its streams and nobody carries on, seen at the end of the list.
        flops: Estimate over all blocks.
        alternates: Path of the list whose blocks take turns with these, if one does; a block is then one of each.
    """

    path: str
    blocks: tuple[Block, ...]
    boundaries: tuple[Mapping[str, fx.Node], ...]
    contexts: tuple[fx.Node, ...] = ()
    emitted: tuple[fx.Node, ...] = ()
    broken: str = ""
    flops: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # role -> the name that the model's code uses
    alternates: tuple[str, ...] = ()

    @property
    def has_its_first(self) -> bool:
        """Whether the first block here is the first of its list: block 0, or 1 of modules under numbered names."""
        name = self.blocks[0].path.rpartition(".")[2]
        number = name[len(name.rstrip("0123456789")) :]
        return not number or int(number) <= (0 if name.isdigit() else 1)

    @property
    def is_carried(self) -> bool:
        """Whether at least one stream runs over every boundary."""
        return len(self.boundaries) == len(self.blocks) + 1


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
