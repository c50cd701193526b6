"""The FLOP counter: torch's formulas, for operations that run and for the nodes of a graph that do not run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cachedit_fx.patterns.nodes import is_tensor, value_of

log = logging.getLogger(__name__)


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Of the attention kernels torch 2.13 has formulas for those of CUDA alone, and would count 0 FLOPs on a CPU.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


class _NoModules(contextlib.nullcontext[None]):
    """Replaces the module tracker, whose hooks are global: modules that run in another thread would call them, too."""

    parents = ("Global",)


class FlopCounter(FlopCounterMode):
    """Counts the FLOPs of the operations that run within it: matrix products, attention and convolutions.

    A multiplication with its addition counts two. Source of the formulas: `torch.utils.flop_counter`.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]

    @property
    def total(self) -> int:
        return int(self.get_total_flops())


def flops_of(nodes: Iterable[fx.Node]) -> list[int]:
    """The FLOPs of every node of a Dynamo graph, counted while each runs by itself on tensors of the meta device.

    torch's formulas are for aten operations, and the nodes are calls of torch functions (`F.linear`), which turn into
    these only when they run. Symbolic sizes are those of the traced call. A node that cannot run by itself counts as 0.
    """
    known: dict[tuple[object, str], int] = {}
    found = []
    with torch.no_grad(), FlopCounter() as counter:
        for node in nodes:
            operands: list[fx.Node] = []
            fx.map_arg((node.args, node.kwargs), operands.append)
            # Whatever counts contracts two tensors, or one with itself.
            if node.op not in ("call_function", "call_method") or sum(map(is_tensor, operands)) < 2:
                found.append(0)
                continue
            described = fx.map_arg((node.args, node.kwargs), lambda arg: _described(value_of(arg)))
            key = (node.target, repr(described))
            if key not in known:  # Blocks repeat: few nodes are run.
                known[key] = _count(counter, node)
            found.append(known[key])
    return found


def _count(counter: FlopCounter, node: fx.Node) -> int:
    before = counter.total
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: _without_data(value_of(arg)))
        run = node.target if callable(node.target) else getattr(args[0], node.target)
        run(*(args if callable(node.target) else args[1:]), **kwargs)
    except Exception as error:  # Whatever an operation without data may raise: its FLOPs are unknown then.
        log.debug("the FLOPs of %s are unknown: %s: %s", node.name, type(error).__name__, str(error).partition("\n")[0])
        return 0
    return counter.total - before


def _described(value: Any) -> Any:
    """What tells two operands apart, with a `repr` that takes little time."""
    if isinstance(value, torch.Tensor):
        return (*map(hint, value.shape), value.dtype)
    return [*map(_described, value)] if isinstance(value, tuple | list) else hint(value)


def _without_data(value: Any) -> Any:
    """What a node's value was at the traced call, with tensors of the meta device."""
    return pytree.tree_map(lambda leaf: _meta(leaf) if isinstance(leaf, torch.Tensor) else hint(leaf), value)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    # One dtype for all: an autocast region that the node is run outside of would have given its operands one.
    is_usual = tensor.is_floating_point() and tensor.element_size() > 1
    dtype = torch.float32 if is_usual else tensor.dtype
    return torch.empty([hint(size) for size in tensor.shape], dtype=dtype, device="meta")


def hint(size: Any) -> Any:
    """What a symbol stood for when the graph was traced; 1 where that depends on data. Other values as they are."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    found = getattr(size.node, "hint", None)
    return found if found is not None else (1 if isinstance(size, torch.SymInt) else 1.0)
