"""Records of tensors and cached graphs that can be pickled. A record holds no data of a tensor.

`torch.fx` pickles the code of a graph and traces it again, which loses the example values. A record lists the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cachedit_fx.passes.extract import generate_code, graph_module
from cachedit_fx.passes.piece import Piece
from cachedit_fx.patterns.nodes import value_of


class NotSavedError(Exception):
    """Something cannot be saved, or does not fit what was saved. The text completes a sentence after "because"."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Everything about a tensor except its values.

    Attributes:
        offset: The storage offset, in elements.
        storage: The number of elements in its storage.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_parameter: bool
    is_inference: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorRecord:
        """The record of a tensor.

        Raises:
            NotSavedError: It is of a subclass or not strided, or a size is symbolic.
        """
        plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)
        if type(tensor) not in plain or tensor.layout != torch.strided:
            raise NotSavedError(f"it has a {type(tensor).__name__} as an input, and only plain tensors can be recorded")
        sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        if not all(isinstance(size, int) for size in sizes):
            raise NotSavedError("its sizes are dynamic")
        return cls(
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
            storage=tensor.untyped_storage().nbytes() // tensor.element_size(),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
            is_parameter=isinstance(tensor, torch.nn.Parameter),
            is_inference=tensor.is_inference(),
        )

    def make(self) -> torch.Tensor:
        """A tensor of this kind, with arbitrary values. It is a fake tensor in the block of a `FakeTensorMode`."""
        with torch.inference_mode(self.is_inference), torch.no_grad():
            made = torch.empty(self.storage, dtype=self.dtype, device=self.device)
            made = made.as_strided(self.shape, self.stride, self.offset)
            if not self.offset and made.numel() == self.storage:
                made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.is_parameter:
            return torch.nn.Parameter(made, requires_grad=self.requires_grad)
        return made.requires_grad_() if self.requires_grad else made


@dataclass(frozen=True, slots=True)
class _NodeNumber:
    """Replaces a node in the arguments of another one."""

    number: int


@dataclass(frozen=True, slots=True)
class _Operator:
    """Replaces an operator of `torch.ops`, which cannot be pickled, as the target of a node."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, target: Any) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return target
        namespace, _, name = target._schema.name.partition("::")
        return cls(namespace, name, target._overloadname)

    def find(self) -> Any:
        return getattr(getattr(getattr(torch.ops, self.namespace), self.name), self.overload)


@dataclass(frozen=True, slots=True)
class _NodeRecord:
    """A node. `example` is the example value; for a placeholder of a piece, what the piece is compiled with."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    example: Any = None
    is_probe: bool = False


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """A graph and the graphs in its submodules. Submodules that share a record share a graph."""

    name: str
    nodes: tuple[_NodeRecord, ...]
    children: dict[str, GraphRecord]


@dataclass(frozen=True, slots=True)
class CachedGraphRecord:
    """A cached graph whose pieces are not compiled.

    Attributes:
        pieces: For every piece, the (segment, submodule) of its calls, and the numbers of its blocks.
    """

    graph: GraphRecord
    pieces: tuple[tuple[tuple[tuple[str, str], ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, gm: fx.GraphModule, pieces: Sequence[Piece]) -> CachedGraphRecord:
        """The record of a graph.

        Raises:
            NotSavedError: It contains a tensor, or has a dynamic size or an input that is no plain tensor.
        """
        names = {segment: name for name, segment in gm.named_children()}
        of_piece: dict[tuple[str, str], GraphRecord] = {}
        for piece in pieces:
            record = _record(piece.gm, {}, has_examples=True)
            of_piece |= {(names[segment], call): record for segment, call in piece.calls}
        children = {
            name: _record(segment, {call: one for (of, call), one in of_piece.items() if of == name})
            for segment, name in names.items()
            if isinstance(segment, fx.GraphModule)
        }
        calls = tuple(
            (tuple((names[segment], call) for segment, call in piece.calls), tuple(piece.blocks)) for piece in pieces
        )
        return cls(_record(gm, children), calls)

    def load(self) -> tuple[fx.GraphModule, tuple[Piece, ...]]:
        """The graph and its pieces, whose example inputs are fake tensors of one new mode."""
        with FakeTensorMode(shape_env=ShapeEnv()):
            gm = _load(self.graph, {})
        segments = dict(gm.named_children())
        pieces = []
        for calls, blocks in self.pieces:
            places = [(segments[segment], call) for segment, call in calls]
            segment, call = places[0]
            pieces.append(Piece(segment.get_submodule(call), places, [*blocks]))  # type: ignore[arg-type]
        return gm, tuple(pieces)


def _record(gm: fx.GraphModule, children: dict[str, GraphRecord], *, has_examples: bool = False) -> GraphRecord:
    number = {node: i for i, node in enumerate(gm.graph.nodes)}

    def encoded(argument: Any) -> Any:
        replaced: Any = lambda a: _NodeNumber(number[a]) if isinstance(a, fx.Node) else a  # noqa: E731
        return fx.node.map_aggregate(argument, replaced)

    nodes = []
    for node in number:
        if node.op in ("get_attr", "call_module") and node.target not in children:
            raise NotSavedError(f"its graph holds the value {node.target}")
        example = _example(node) if has_examples and node.op != "output" else None
        is_probe, arguments = "cachedit_probe" in node.meta, (encoded(node.args), encoded(node.kwargs))
        nodes.append(_NodeRecord(node.name, node.op, _Operator.of(node.target), *arguments, example, is_probe))
    return GraphRecord(type(gm).__name__, tuple(nodes), children)


def _example(node: fx.Node) -> Any:
    value = value_of(node)
    if node.op != "placeholder":
        return _recorded(value)
    value = node.meta.get("cachedit_example", value)
    if not isinstance(value, torch.Tensor | torch.SymInt):
        raise NotSavedError(f"an input of its graph is a {type(value).__name__}, and only tensors can be recorded")
    return _recorded(value)


def _recorded(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorRecord.of(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise NotSavedError("its sizes are dynamic")
    return tuple(map(_recorded, value)) if isinstance(value, tuple | list) else None


def _load(record: GraphRecord, loaded: dict[int, fx.GraphModule]) -> fx.GraphModule:
    """The graph of a record. `loaded` has those that were made before, by the identity of their records."""
    if id(record) in loaded:
        return loaded[id(record)]
    root = torch.nn.Module()
    for name, child in record.children.items():
        root.add_module(name, _load(child, loaded))
    graph = fx.Graph()
    made: list[fx.Node] = []

    def decoded(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, lambda a: made[a.number] if isinstance(a, _NodeNumber) else a)

    for one in record.nodes:
        target = one.target.find() if isinstance(one.target, _Operator) else one.target
        node = graph.create_node(one.op, target, decoded(one.args), decoded(one.kwargs), name=one.name)
        if one.example is not None:
            node.meta["example_value"] = _value(one.example)
        if one.is_probe:
            node.meta["cachedit_probe"] = True
        made.append(node)
    gm = loaded[id(record)] = graph_module(root, graph, record.name)
    generate_code(gm)
    return gm


def _value(example: Any) -> Any:
    if isinstance(example, tuple):
        return tuple(map(_value, example))
    return example.make() if isinstance(example, TensorRecord) else example


def codes_of(gm: fx.GraphModule) -> Iterator[str]:
    """The generated code of a cached graph and of its segments."""
    yield gm.code
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            yield child.code
