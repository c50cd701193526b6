"""Counts the FLOPs and bytes of the nodes of a graph, by running its operations on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cachedit_fx.flops import FlopCounter, flops_of, hint
from cachedit_fx.inspect.explanation.data import Cost
from cachedit_fx.passes.analysis.dataflow import is_weight
from cachedit_fx.passes.extract import extract, outputs_of
from cachedit_fx.passes.transforms.split_pieces import structure_key
from cachedit_fx.patterns.nodes import value_of

log = logging.getLogger(__name__)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


class CostCounter:
    """Counts the costs of sequences of nodes of one graph. Sequences of equal structure are counted once.

    Attributes:
        is_estimated: Whether some sequence could not be run on fake tensors, because its shapes depend on data. Its
            FLOPs are then the sum over its nodes, each run by itself, and its bytes are unknown.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._counted: dict[Hashable, Cost] = {}
        self.is_estimated = False

    def of(self, nodes: Sequence[fx.Node]) -> Cost:
        """Returns the cost of nodes that are given in program order."""
        run = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
        if not run:
            return Cost()
        taken = extract(run)
        return self.of_piece(taken.finish(self._gm, [taken.copies[node] for node in outputs_of(run)], "Counted"))

    def of_piece(self, piece: fx.GraphModule) -> Cost:
        """Returns the cost of one call of a separate graph, whose placeholders hold the values of the traced call."""
        inputs = [node for node in piece.graph.nodes if node.op == "placeholder"]
        weights = [i for i, n in enumerate(inputs) if is_weight(n) and isinstance(value_of(n), torch.Tensor)]
        key = (structure_key(piece, strides=False), tuple(weights))
        if key not in self._counted:
            self._counted[key] = self._count(piece, inputs, sum(num_bytes(value_of(inputs[i])) for i in weights))
        return self._counted[key]

    def _count(self, piece: fx.GraphModule, placeholders: list[fx.Node], weight_bytes: int) -> Cost:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        counter, moved = FlopCounter(), _MovedBytes()
        try:
            with mode, torch.no_grad():
                inputs = [at_hint(value_of(node), mode) for node in placeholders]
                with counter, moved:
                    _Interpreter(piece).run(*inputs, enable_io_processing=False)
        except Exception as error:  # An operation on fake tensors may raise anything; the costs are only displayed.
            log.debug("costs are estimated: %s: %s", type(error).__name__, str(error).partition("\n")[0])
            self.is_estimated = True
            return Cost(sum(flops_of(piece.graph.nodes)), 0, weight_bytes)
        return Cost(counter.total, moved.total, weight_bytes)


class _Interpreter(fx.Interpreter):
    """Runs a graph on fake tensors. The values of numbers are those of the traced call."""

    def run_node(self, n: fx.Node) -> Any:
        value = value_of(n)
        if n.op in ("call_function", "call_method") and isinstance(value, _NUMBERS):
            return hint(value)
        return super().run_node(n)


class _MovedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that every operation reads and writes. Views are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            leaves = pytree.tree_leaves((args, kwargs, result))
            self.total += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def at_hint(value: Any, mode: FakeTensorMode) -> Any:
    """Returns a value with the sizes of the traced call as ints; a tensor becomes a fake tensor of `mode`."""
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    if isinstance(value, torch.Tensor):
        sizes, strides = map(hint, value.shape), map(hint, value.stride())
        return torch.empty_strided(tuple(sizes), tuple(strides), dtype=value.dtype, device=value.device)
    return hint(value)


def num_bytes(value: Any) -> int:
    """Returns the size of a tensor in bytes, at the sizes of the traced call."""
    count = 1
    for size in value.shape:
        count *= int(hint(size))
    return count * int(value.element_size())
