"""Splits a segment into pieces to compile, and lets blocks of equal structure share one piece.

    compute: 12 blocks inline     ->     compute: piece_0(...), piece_0(...), ..., piece_1(...)

Blocks are equal if they have the same operations, constants, shapes and dtypes; weights are inputs. Two things that
need not differ are normalised, so that a chain of two lists has two pieces: a view that ends a block is taken outside
(the last block lacks one of two), and where only an input's stride differs it is made contiguous first. What stands
side by side and is shared with nothing is one piece: every call of one costs, and what lies in one can be fused.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from cachedit_fx.passes.analysis.dataflow import is_layout
from cachedit_fx.passes.analysis.op_tables import VIEW_FUNCTIONS
from cachedit_fx.passes.extract import extract, free_sizes, generate_code, outputs_of
from cachedit_fx.patterns.nodes import is_tensor, size_key, value_of


@dataclass(slots=True)
class Piece:
    """One graph to compile, and where it is called from.

    Attributes:
        calls: (segment, name of the submodule) of every call; all are to be replaced by the one compiled piece.
        blocks: Numbers of the chain's blocks that share it; empty for what lies around the blocks.
    """

    gm: fx.GraphModule
    calls: list[tuple[fx.GraphModule, str]]
    blocks: list[int] = field(default_factory=list)

    @property
    def example_inputs(self) -> list[Any]:
        """What to compile it with: Dynamo's own inputs, and fakes for the values between pieces."""
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        return [node.meta.get("cachedit_example", value_of(node)) for node in placeholders]


def split_pieces(segments: Sequence[fx.GraphModule], *, share_blocks: bool, free_strides: bool) -> list[Piece]:
    """Turns every segment, in place, into calls of pieces; returns the pieces.

    Args:
        share_blocks: One piece per distinct block; otherwise one piece per segment.
        free_strides: Blocks whose inputs differ in stride alone may share a piece. Their inputs are copied to be
            contiguous, which changes rounding where a kernel looks at strides.
    """
    runs = {segment: _runs(segment.graph, share_blocks) for segment in segments}
    if share_blocks:
        runs = _merge_lonely(runs, strides=not free_strides)
    calls = []
    for segment in segments:
        sizes = free_sizes(segment.graph)
        for i, run in enumerate(runs[segment]):
            blocks = _blocks_of(run) if share_blocks else ()
            calls.append(_Call(segment, _outline(segment, run, f"piece_{i}", sizes), blocks))
    if free_strides:
        _free_strides([call for call in calls if call.blocks])
    groups: dict[Hashable, Piece] = {}
    for call in calls:
        piece = groups.setdefault(structure_key(call.gm), Piece(call.gm, []))
        if piece.gm is not call.gm:  # It goes with its segment; what it was traced with must not wait for that.
            for node in call.gm.graph.nodes:
                node.meta.pop("cachedit_example", None)
        piece.calls.append((call.segment, str(call.node.target)))
        piece.blocks += call.blocks
    for segment in segments:
        segment.graph.lint()
        segment.recompile()
        generate_code(segment)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class _Call:
    segment: fx.GraphModule
    node: fx.Node
    blocks: tuple[int, ...]

    @property
    def gm(self) -> fx.GraphModule:
        gm = self.segment.get_submodule(str(self.node.target))
        assert isinstance(gm, fx.GraphModule)
        return gm


def _free_strides(calls: list[_Call]) -> None:
    """Copies strided inputs of blocks that are equal but for strides, so that they become equal."""
    alike: dict[Hashable, list[_Call]] = defaultdict(list)
    for call in calls:
        alike[structure_key(call.gm, strides=False)].append(call)
    for group in alike.values():
        if len({_strides_key(call.gm) for call in group}) > 1:
            for call in group:
                _make_contiguous(call.segment, call.node, call.gm)


def structure_key(gm: fx.GraphModule, *, strides: bool = True) -> Hashable:
    """Equal for two graphs that one compiled piece can serve: operations, constants, shapes, dtypes, input strides."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    return tuple(_node_key(node, gm, number, strides) for node in number)


def _node_key(node: fx.Node, gm: fx.GraphModule, number: dict[fx.Node, int], strides: bool) -> Hashable:
    target: Hashable = node.target
    if node.op == "placeholder":
        target = _value_key(value_of(node), strides)
    elif node.op in ("get_attr", "call_module"):
        target = id(operator.attrgetter(str(node.target))(gm))
    return (node.op, target, _argument_key(node.args, number), _argument_key(node.kwargs, number))


def _run_key(segment: fx.GraphModule, run: list[fx.Node], sizes: Sequence[fx.Node], strides: bool) -> Hashable:
    """Equal for two runs whose pieces would be of equal structure; makes no piece."""
    number: dict[fx.Node, int] = {}
    key: list[Hashable] = []

    def read(node: fx.Node) -> None:  # As `Extract.take` does.
        if node in number:
            return
        is_copied = node.op == "get_attr" or node.target == "item"
        for arg in node.all_input_nodes if is_copied else ():
            read(arg)
        number[node] = len(number)
        key.append(_node_key(node, segment, number, strides) if is_copied else _value_key(value_of(node), strides))

    inside = set(run)
    outside = (arg for node in run for arg in node.all_input_nodes if arg not in inside)
    for arg in (*sizes, *outside):
        read(arg)
    for node in run:
        number[node] = len(number)
        key.append(_node_key(node, segment, number, strides))
    return (*key, *(number[node] for node in outputs_of(run)))


def _strides_key(gm: fx.GraphModule) -> Hashable:
    return tuple(_value_key(value_of(node), True) for node in gm.graph.nodes if node.op == "placeholder")


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
    """Numbers of the blocks that a run has nodes of, each once."""
    return tuple(dict.fromkeys(block for block in map(_block_of, run) if block is not None))


def _runs(graph: fx.Graph, share_blocks: bool) -> list[list[fx.Node]]:
    """Consecutive nodes that become one piece each. What stays outside: views that end a block, sizes, lone views."""
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
    """Runs that follow each other and are equal to no other, as one; with what lies between them."""
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
    """Whether a run is worth a piece: sizes and views cost nothing as they are."""
    return any(not is_layout(node) and (is_tensor(node) or value_of(node) is None) for node in run)


def _without_final_views(run: list[fx.Node]) -> list[fx.Node]:
    merged_runs = set(run)
    for node in reversed(run):
        is_view = node.target in VIEW_FUNCTIONS and is_tensor(node) and is_tensor(node.all_input_nodes[0])
        if is_view and not any(user in merged_runs for user in node.users):
            merged_runs.remove(node)
    inside = [node for node in run if node in merged_runs]
    for node in reversed([node for node in run if node not in merged_runs]):
        inside[-1].append(node)  # What reads a view stands after the run; so may the view.
    return inside


def _outline(segment: fx.GraphModule, run: list[fx.Node], name: str, sizes: Sequence[fx.Node]) -> fx.Node:
    """Replaces `run` by a call of a submodule that holds it; returns the call."""
    taken = extract(run, sizes)
    outputs = outputs_of(run)
    segment.add_module(name, taken.finish(segment, [taken.copies[node] for node in outputs], name.title()))
    graph, inside = segment.graph, set(run)
    # Behind the last thing it reads and before the first that reads it: where the last node of the run stands.
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
    return call


def _make_contiguous(segment: fx.GraphModule, call: fx.Node, gm: fx.GraphModule) -> None:
    """Copies strided inputs before the call, where that leaves the strides of all outputs as they were."""
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
    """Numbers that are read off a tensor, as a lifted `eps` is, are those that the graph was captured with."""

    def run_node(self, n: fx.Node) -> Any:
        known = value_of(n)
        return known if n.target == "item" and known is not None else super().run_node(n)


def _is_strided_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "fake_mode") and not value.is_contiguous()


def _stride(value: Any) -> Hashable:
    return tuple(value.stride()) if isinstance(value, torch.Tensor) else None
