"""Counts what costs time on a GPU without computing: waits of the host, recordings and copies of CUDA graphs."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

_SYNCHRONIZING = "synchronizing CUDA operation"  # Of the warning that `torch.cuda.set_sync_debug_mode` turns on.
_READS = ("tolist", "item", "__bool__", "__float__", "__int__")  # Methods of a tensor that return what it holds.
# A wait for an event or for the device does not warn. `torch.Event` cannot be patched: a profile shows its waits.
_WAITS = (("torch.cuda", "synchronize"), ("torch.cuda.Event", "synchronize"))


@dataclass
class HostWaits:
    """How often the host waited for the device: so far, and at each call."""

    count: int = 0
    by_call: list[int] = field(default_factory=list)


@contextmanager
def count_host_waits(device: str) -> Iterator[HostWaits]:
    """Counts in the block how often the host waits. On a CPU, counts reads of tensors that would wait on a GPU."""
    found = HostWaits()
    reads = [(torch.Tensor, name) for name in _READS]
    patched = reads if device == "cpu" else [(_named(path), name) for path, name in _WAITS]
    with warnings.catch_warnings(record=True) as caught, _counting(patched, found):
        warnings.simplefilter("always")
        mode = 0 if device == "cpu" else torch.cuda.get_sync_debug_mode()
        try:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("warn")
            yield found
        finally:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode(mode)
    found.count += sum(_SYNCHRONIZING in str(warning.message) for warning in caught)


def _named(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


@contextmanager
def _counting(patched: Iterable[tuple[Any, str]], found: HostWaits) -> Iterator[None]:
    """Replaces functions by ones that count their calls. A call inside of another one does not count."""
    originals = [(owner, name, owner.__dict__.get(name), getattr(owner, name)) for owner, name in patched]
    depth = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.count += not depth[0]
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    try:
        for owner, name, _, original in originals:
            setattr(owner, name, counted(original))
        yield
    finally:
        for owner, name, own, _ in originals:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


@dataclass
class GraphUse:
    """What CUDA graphs did in a block.

    Attributes:
        is_known: Whether this version of torch has the names from which the rest is counted.
        recorded: The number of recorded graphs.
        replayed: The number of runs of recorded graphs.
        copied: The number of inputs that were copied into the memory of a graph.
        copied_bytes: Their bytes.
        copied_weights: How many of them were weights.
        skipped: The number of compiled pieces for which Inductor did not use CUDA graphs.
    """

    is_known: bool = False
    recorded: int = 0
    replayed: int = 0
    copied: int = 0
    copied_bytes: int = 0
    copied_weights: int = 0
    skipped: int = 0


@contextmanager
def count_graph_use(weights: Iterable[Tensor] = ()) -> Iterator[GraphUse]:
    """Counts in the block what the CUDA graphs of Inductor do.

    Uses `CUDAGraphNode` of `torch._inductor.cudagraph_trees` with `__init__`, `_copy_inputs_and_remove_from_src` and
    `non_static_input_idx`, which torch 2.11 to 2.13 have.
    """
    found = GraphUse()
    addresses = {address for weight in weights if (address := _address_of(weight))}
    counters = torch._dynamo.utils.counters["inductor"]
    skipped = counters["cudagraph_skips"]
    node = getattr(importlib.import_module("torch._inductor.cudagraph_trees"), "CUDAGraphNode", None)
    copy = getattr(node, "_copy_inputs_and_remove_from_src", None)
    if node is None or copy is None:
        yield found
        found.skipped = counters["cudagraph_skips"] - skipped
        return
    record = node.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        found.recorded += 1
        record(self, *args, **kwargs)

    def copying(self: Any, dsts: Any, srcs: Any) -> Any:
        given = [srcs[i] for i in self.non_static_input_idx if isinstance(srcs[i], Tensor)]
        found.replayed += 1
        found.copied += len(given)
        found.copied_bytes += sum(tensor.nbytes for tensor in given)
        found.copied_weights += sum(tensor.data_ptr() in addresses for tensor in given)
        return copy(self, dsts, srcs)

    try:
        node.__init__, node._copy_inputs_and_remove_from_src = recording, copying
        found.is_known = True
        yield found
    finally:
        node.__init__, node._copy_inputs_and_remove_from_src = record, copy
        found.skipped = counters["cudagraph_skips"] - skipped


def _address_of(weight: Tensor) -> int:
    """Returns the address of a tensor; 0 for a quantized one that consists of several tensors."""
    try:
        return weight.data_ptr()
    except RuntimeError:
        return 0


def num_compilations() -> int:
    """Returns the number of frames that Dynamo has examined; calls of compiled code are not counted."""
    return int(torch._dynamo.utils.counters["frames"]["total"])
