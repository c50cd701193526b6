"""Splits segments into pieces to compile. Blocks of equal structure share one piece.

    compute: 12 blocks inline     ->     compute: piece_0(...), piece_0(...), ..., piece_1(...)

Blocks are equal if they have the same operations, constants, shapes and dtypes; weights are inputs. Two differences are
removed, so that a chain of two lists has two pieces: views at the end of a block are moved out of it (the last block
may have fewer), and if only the stride of an input differs, the input is made contiguous. Adjacent runs that do not
share a piece with others become one piece: every call of a piece has a cost, and operations in a piece can be fused.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.analysis.dataflow import is_layout
from cachedit_fx.passes.analysis.op_tables import VIEW_FUNCTIONS
from cachedit_fx.passes.extract import extract, free_sizes, generate_code, outputs_of
from cachedit_fx.passes.graph_pass import GraphPass
from cachedit_fx.passes.piece import Piece
from cachedit_fx.patterns.nodes import is_tensor, size_key, value_of


class SplitPieces(GraphPass):
    """Turns every segment of a cached graph, in place, into calls of pieces; adds the pieces to the context.

    There is one piece per distinct block if `config.compile_blocks` is "once", otherwise one piece per segment. Unless
    `context.exact`, blocks whose inputs differ only in stride share a piece. Their inputs are copied to be contiguous,
    which changes rounding if a kernel depends on strides. If the weights of the model are offloaded, everything that
    reads a weight is in a piece, which brings it to the device, and blocks are not merged into one piece.
    """

    name = "split-pieces"

    def requires(self, graph_module: fx.GraphModule) -> None:
        for segment in segments_of(graph_module):
            has_pieces = any(name.startswith("piece_") for name, _ in segment.named_children())
            assert not has_pieces, "a segment has been split before"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        share_blocks = self.context.config.compile_blocks == "once"
        pieces = _split(segments_of(graph_module), share_blocks=share_blocks, free_strides=not self.context.exact)
        self.context.pieces = tuple(pieces)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        replaced = {call for piece in self.context.pieces for call in piece.calls}
        for segment in segments_of(graph_module):
            for weight in filter(_is_offloaded, segment.graph.find_nodes(op="placeholder")):
                assert all((segment, user.target) in replaced for user in weight.users), f"{weight} is read by no piece"
        for piece in self.context.pieces:
            piece.gm.graph.lint()
        for segment in segments_of(graph_module):
            for node in segment.graph.find_nodes(op="call_module"):
                is_piece = isinstance(segment.get_submodule(str(node.target)), fx.GraphModule)
                assert not is_piece or (segment, node.target) in replaced, f"{node} calls a graph that is no piece"


def segments_of(cached_graph: fx.GraphModule) -> list[fx.GraphModule]:
    """The head, the branches, the graphs between the regions, and the tail."""
    return [module for module in cached_graph.children() if isinstance(module, fx.GraphModule)]


def _split(segments: Sequence[fx.GraphModule], *, share_blocks: bool, free_strides: bool) -> list[Piece]:
    runs = {segment: _runs(segment.graph, share_blocks) for segment in segments}
    if share_blocks and not any(_is_offloaded(node) for segment in segments for node in segment.graph.nodes):
        runs = _merge_lonely(runs, strides=not free_strides)
    calls = []
    for segment in segments:
        sizes = free_sizes(segment.graph)
        for i, run in enumerate(runs[segment]):
            blocks = _blocks_of(run) if share_blocks else ()
            calls.append(_outline(segment, run, f"piece_{i}", sizes, blocks))
    bodies = {call: _body_key(call.gm) for call in calls}
    if free_strides:
        _free_strides({call: body for call, body in bodies.items() if call.blocks})
    groups: dict[Hashable, Piece] = {}
    for call, body in bodies.items():
        piece = groups.setdefault((_inputs_key(call.gm, strides=True), body), Piece(call.gm, []))
        if piece.gm is not call.gm:  # Only its segment holds it; its example inputs are released now.
            for node in call.gm.graph.nodes:
                node.meta.pop("cachedit_example", None)
        piece.calls.append((call.segment, str(call.node.target)))
        piece.blocks += call.blocks
    for segment in segments:
        segment.recompile()
        generate_code(segment)
    return list(groups.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    segment: fx.GraphModule
    node: fx.Node
    gm: fx.GraphModule
    blocks: tuple[int, ...]


def _free_strides(bodies: Mapping[_Call, Hashable]) -> None:
    """Copies the strided inputs of blocks that differ only in strides, so that the blocks become equal.

    Args:
        bodies: Every call, with the `_body_key` of its graph.
    """
    alike: dict[Hashable, list[_Call]] = defaultdict(list)
    for call, body in bodies.items():
        alike[_inputs_key(call.gm, strides=False), body].append(call)
    for group in alike.values():
        if len({_inputs_key(call.gm, strides=True) for call in group}) > 1:
            for call in group:
                _make_contiguous(call.segment, call.node, call.gm)


def structure_key(gm: fx.GraphModule, *, strides: bool = True) -> Hashable:
    """Equal for graphs that can share a piece: the operations, constants, shapes, dtypes and strides of the inputs."""
    return (_inputs_key(gm, strides=strides), _body_key(gm))


def _inputs_key(gm: fx.GraphModule, *, strides: bool) -> Hashable:
    return tuple(_value_key(value_of(node), strides) for node in gm.graph.find_nodes(op="placeholder"))


def _body_key(gm: fx.GraphModule) -> Hashable:
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    return tuple(_node_key(node, gm, number) for node in number if node.op != "placeholder")


def _node_key(node: fx.Node, gm: fx.GraphModule, number: dict[fx.Node, int]) -> Hashable:
    target: Hashable = node.target
    if node.op in ("get_attr", "call_module"):
        target = id(operator.attrgetter(str(node.target))(gm))
    return (node.op, target, _argument_key(node.args, number), _argument_key(node.kwargs, number))


def _run_key(segment: fx.GraphModule, run: list[fx.Node], sizes: Sequence[fx.Node], strides: bool) -> Hashable:
    """Equal for runs whose pieces would have equal structure keys. Builds no piece."""
    number: dict[fx.Node, int] = {}
    key: list[Hashable] = []

    def read(node: fx.Node) -> None:  # As `Extract.take` does.
        if node in number:
            return
        is_copied = node.op == "get_attr" or node.target == "item"
        for arg in node.all_input_nodes if is_copied else ():
            read(arg)
        number[node] = len(number)
        key.append(_node_key(node, segment, number) if is_copied else _value_key(value_of(node), strides))

    inside = set(run)
    outside = (arg for node in run for arg in node.all_input_nodes if arg not in inside)
    for arg in (*sizes, *outside):
        read(arg)
    for node in run:
        number[node] = len(number)
        key.append(_node_key(node, segment, number))
    return (*key, *(number[node] for node in outputs_of(run)))


def _value_key(value: Any, with_strides: bool) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__, size_key(value) if isinstance(value, torch.SymInt) else None)
    shape = tuple(size_key(s) for s in value.shape)
    strides = tuple(size_key(s) for s in value.stride()) if with_strides and value.layout == torch.strided else ()
    is_subclass = None if type(value) in (torch.Tensor, torch.nn.Parameter) else type(value).__name__
    fake = getattr(value, "fake_mode", None) is not None
    kind = None if fake else is_subclass
    return (shape, strides, value.dtype, value.device, value.layout, value.requires_grad, kind)


def _argument_key(value: Any, number: dict[fx.Node, int]) -> Hashable:
    if isinstance(value, fx.Node):
        return ("node", number[value])
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_argument_key(item, number) for item in value))
    if isinstance(value, dict):
        return tuple(sorted((str(k), _argument_key(v, number)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *(_argument_key(part, number) for part in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _block_of(node: fx.Node) -> int | None:
    return node.meta.get("cachedit_block")


def _blocks_of(run: list[fx.Node]) -> tuple[int, ...]:
    """Numbers of the blocks whose nodes a run contains, each once."""
    return tuple(dict.fromkeys(block for block in map(_block_of, run) if block is not None))


def _runs(graph: fx.Graph, share_blocks: bool) -> list[list[fx.Node]]:
    """Runs of nodes, each of which becomes a piece. Views at the end of a block, sizes and lone views are in none."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if not share_blocks:
        return [nodes] if nodes else []
    runs: list[list[fx.Node]] = []
    last: Hashable = None
    for node in nodes:
        tag = (_block_of(node), "cachedit_probe" in node.meta)
        if not runs or tag != last:
            runs.append([])
        runs[-1].append(node)
        last = tag
    runs = [_without_final_views(run) if _block_of(run[0]) is not None else run for run in runs]
    return [run for run in runs if _computes(run)]


def _merge_lonely(
    runs: Mapping[fx.GraphModule, list[list[fx.Node]]], *, strides: bool
) -> dict[fx.GraphModule, list[list[fx.Node]]]:
    """The runs, with adjacent ones that are equal to no other merged, including the nodes between them."""
    keys = {}
    for segment, found in runs.items():
        sizes = free_sizes(segment.graph)
        keys[segment] = [_run_key(segment, run, sizes, strides) for run in found]
    counts = Counter(itertools.chain.from_iterable(keys.values()))
    merged = {}
    for segment, found in runs.items():
        position = {node: i for i, node in enumerate(segment.graph.nodes)}
        nodes = list(position)
        merged_runs: list[list[fx.Node]] = []
        was_lonely = False
        for run, key in zip(found, keys[segment], strict=True):
            is_lonely = counts[key] == 1
            if is_lonely and was_lonely:
                first, last = position[merged_runs[-1][0]], max(map(position.__getitem__, run))
                merged_runs[-1] = [n for n in nodes[first : last + 1] if n.op not in ("placeholder", "get_attr")]
            else:
                merged_runs.append(run)
            was_lonely = is_lonely
        merged[segment] = merged_runs
    return merged


def _computes(run: list[fx.Node]) -> bool:
    """Whether a run has to be a piece. Sizes and views cost nothing, but an offloaded weight is only in a piece."""
    return any(
        _reads_offloaded(node) or (not is_layout(node) and (is_tensor(node) or value_of(node) is None)) for node in run
    )


def _is_offloaded(node: fx.Node) -> bool:
    return node.op == "placeholder" and "cachedit_offloaded" in node.meta


def _reads_offloaded(node: fx.Node) -> bool:
    return any(map(_is_offloaded, node.all_input_nodes))


def _without_final_views(run: list[fx.Node]) -> list[fx.Node]:
    merged_runs = set(run)
    for node in reversed(run):
        is_view = node.target in VIEW_FUNCTIONS and is_tensor(node) and is_tensor(node.all_input_nodes[0])
        is_free = is_view and not _reads_offloaded(node)
        if is_free and not any(user in merged_runs for user in node.users):
            merged_runs.remove(node)
    inside = [node for node in run if node in merged_runs]
    for node in reversed([node for node in run if node not in merged_runs]):
        inside[-1].append(node)  # The readers of a view are after the run, so the view can be, too.
    return inside


def _outline(
    segment: fx.GraphModule, run: list[fx.Node], name: str, sizes: Sequence[fx.Node], blocks: tuple[int, ...]
) -> _Call:
    """Moves `run` to the submodule `name`. Returns the call that replaces it."""
    taken = extract(run, sizes)
    outputs = outputs_of(run)
    piece = taken.finish(segment, [taken.copies[node] for node in outputs], name.title())
    segment.add_module(name, piece)
    graph, inside = segment.graph, set(run)
    # The place of the last node of the run is after everything that the run reads, and before all its readers.
    with graph.inserting_after(run[-1]):
        call = graph.call_module(name, tuple(taken.inputs))
    anchor = call
    for i, node in enumerate(outputs):
        with graph.inserting_after(anchor):
            anchor = graph.call_function(operator.getitem, (call, i))
        anchor.meta = dict(node.meta)
        node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)
    return _Call(segment, call, piece, blocks)


def _make_contiguous(segment: fx.GraphModule, call: fx.Node, gm: fx.GraphModule) -> None:
    """Copies strided inputs before the call, if that does not change the strides of any output."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [value_of(node) for node in placeholders]
    strided = [i for i, value in enumerate(values) if _is_strided_stream(value)]
    if not strided or any(isinstance(s, torch.SymInt) for v in values if isinstance(v, torch.Tensor) for s in v.shape):
        return
    mode = next(value.fake_mode for i, value in enumerate(values) if i in strided)
    with mode, torch.no_grad():
        fresh = [value.contiguous() if i in strided else value for i, value in enumerate(values)]
    before = [value_of(node) for node in gm.graph.output_node().all_input_nodes]
    with torch.no_grad():
        after = _Propagation(gm, mode).propagate(*fresh)
    if any(_stride(a) != _stride(b) for a, b in zip(before, after, strict=True)):
        return
    arguments = list(call.args)
    for i in strided:
        with segment.graph.inserting_before(call):
            source = arguments[i]
            arguments[i] = segment.graph.call_method("contiguous", (source,))
        placeholders[i].meta = {"example_value": fresh[i]}
    call.args = tuple(arguments)


class _Propagation(FakeTensorProp):
    """Propagation in which numbers that are read from tensors, such as a lifted `eps`, have their captured values."""

    def run_node(self, n: fx.Node) -> Any:
        known = value_of(n)
        return known if n.target == "item" and known is not None else super().run_node(n)


def _is_strided_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "fake_mode") and not value.is_contiguous()


def _stride(value: Any) -> Hashable:
    return tuple(value.stride()) if isinstance(value, torch.Tensor) else None
