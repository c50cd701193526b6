"""The cached graph, which is run by hand, and the pieces that are compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.passes.graph_pass import PassContext
from cachedit_fx.passes.manager import plan_graph
from cachedit_fx.passes.piece import Piece
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.insert_conditionals import compute_or_reuse
from cachedit_fx.passes.transforms.split_pieces import SplitPieces
from cachedit_fx.patterns.nodes import value_of
from tests.models import FLUX
from tests.reference import ReferenceCache
from tests.synthetic import (
    DEPTH,
    IMAGE,
    PATTERNS,
    CachedGraph,
    Captured,
    DualStream,
    HandStep,
    SelfBlock,
    Transformer,
    capture,
    insert_conditionals,
    make_inputs,
)
from tests.zoo import VARIANTS


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def flux_inputs(seed: int = 1, time: float = 0.9) -> dict[str, Any]:
    prompt = FLUX.prompt(1).cond
    return dict(hidden_states=FLUX.latents(seed), timestep=torch.full((2,), time), return_dict=False, **prompt)


def cached_graph(model: nn.Module, inputs: dict[str, Any] | None = None, **fields: Any) -> Captured:
    """The cached graph of the model, with one Fn block unless `fields` says otherwise."""
    config = CacheConfig(**{"Fn_compute_blocks": 1, **fields})

    def rewrite(gm: fx.GraphModule) -> CachedGraph:
        found = plan_graph(gm, config)
        assert isinstance(found, Plan), [str(mismatch) for mismatch in found]
        return insert_conditionals(found, exact=True)

    return capture(model.eval(), make_inputs(model) if inputs is None else inputs, rewrite)


def segments_of(graph: CachedGraph) -> dict[str, fx.GraphModule]:
    return {name: child for name, child in graph.gm.named_children() if isinstance(child, fx.GraphModule)}


def assert_bitwise(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


# Symbols.


def symbolic(model: nn.Module, rewrite: Callable[[Plan], Any]) -> Any:
    """The result of `rewrite` for the plan of a graph whose sizes are symbols."""
    config = CacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1)

    def analyse(gm: fx.GraphModule) -> Any:
        found = plan_graph(gm, config)
        assert isinstance(found, Plan), [str(mismatch) for mismatch in found]
        return rewrite(found)

    return capture(model.eval(), make_inputs(model), analyse, dynamic=True).found


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@pytest.mark.parametrize("model", [Transformer, DualStream], ids=["hidden-only", "dual-stream"])
def test_with_dynamic_sizes_every_size_is_computed_before_the_first_block(model):
    def positions(found: Plan) -> tuple[list[int], int]:
        nodes = found.program.nodes
        sizes = [i for i, node in enumerate(nodes) if isinstance(value_of(node), SYMBOLIC) and node.target != "item"]
        return sizes, found.chain[0].blocks.blocks[0].start

    sizes, start = symbolic(model(), positions)
    assert sizes and max(sizes) < start


@pytest.mark.parametrize("model", [Transformer, DualStream], ids=["hidden-only", "dual-stream"])
def test_with_dynamic_sizes_only_tensors_and_sizes_cross_the_cuts(model):
    def types(found: Plan) -> tuple[set[type], set[type]]:
        cached_graph = insert_conditionals(found).gm
        modules = [cached_graph.get_submodule(name) for name in ("compute_0", "reuse_0", "tail")]
        inputs = [n for module in modules for n in module.graph.nodes if n.op == "placeholder"]
        live_outs = {type(value_of(pair.after)) for pair in found.regions[0].live_outs}
        named = [value_of(node) for node in inputs if not node.name.startswith("cached_")]
        return {type(value) for value in named} - {nn.Parameter}, live_outs

    crossing, live_outs = symbolic(model(), types)
    assert {t.__name__ for t in crossing} == {"FakeTensor", "SymInt"}
    assert {t.__name__ for t in live_outs} == {"FakeTensor"}


def test_one_compiled_graph_serves_all_sizes():
    model = Transformer().eval()
    config = CacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, inner_backend="eager", on_no_match="raise")
    module = torch.compile(model, backend=cachedit_fx.Backend(config), fullgraph=True, dynamic=True)
    module(**make_inputs(model))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (IMAGE, 4, 9):
            inputs = make_inputs(model, tokens=tokens)
            torch.testing.assert_close(module(**inputs), model(**inputs), rtol=0, atol=0)


class Square(Transformer):
    """Takes the square root of the number of tokens after its loop, as DiT does to fold them into an image."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        (out,) = super().forward(hidden_states, timestep)
        side = int(out.shape[1] ** 0.5)
        return (out[:, : side * side].unflatten(1, (side, side)),)


def test_a_size_that_cannot_be_computed_from_symbols_alone_is_not_moved():
    model = Square().eval()
    config = CacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, inner_backend="eager", on_no_match="raise")
    module = torch.compile(model, backend=cachedit_fx.Backend(config), dynamic=True)
    for tokens in (16, 9):
        inputs = make_inputs(model, tokens=tokens)
        assert_bitwise(module(**inputs)[0], model(**inputs)[0])
    assert cachedit_fx.is_cached(model)


# Conditional.

CASES = [
    *(pytest.param(model, {}, id=f"{number}") for number, model in PATTERNS.items()),
    *(pytest.param(model, {"Bn_compute_blocks": 1}, id=f"{number}-bn") for number, model in PATTERNS.items()),
    pytest.param(Transformer, {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, id="3-one-block"),
]


def test_the_cached_graph_consists_of_head_decision_conditional_and_tail():
    graph = cached_graph(DualStream(), Bn_compute_blocks=1).found.gm
    check = FileCheck().check("step.before(0)").check("self.head(").check("step.decide(0, ").check("step.cached(0)")
    check = (
        check.check("self.compute_0")
        .check("self.reuse_0")
        .check("_insert_conditionals_compute_or_reuse(")
        .check("step.update(0, ")
    )
    check.check("self.tail(").check("return ").run(graph.code)
    calls = [node for node in graph.graph.nodes if node.target is compute_or_reuse]
    assert len(calls) == 1
    pred, compute, reuse, operands = calls[0].args
    assert (pred.target, compute.target, reuse.target) == ("decide", "compute_0", "reuse_0")
    for branch in (graph.compute_0, graph.reuse_0):
        assert len([node for node in branch.graph.nodes if node.op == "placeholder"]) == len(operands)


def test_compute_or_reuse_has_the_signature_of_cond():
    ours, cond = (list(inspect.signature(function).parameters) for function in (compute_or_reuse, torch.cond))
    assert ours == ["pred", "compute", "reuse", "operands"]
    assert len(cond) == len(ours) and (cond[0], cond[3]) == (ours[0], ours[3])
    add, sub = torch.add, torch.sub
    assert compute_or_reuse(True, lambda a, b: (add(a, b),), lambda a, b: (sub(a, b),), (5, 3)) == (8,)
    assert compute_or_reuse(False, lambda a, b: (add(a, b),), lambda a, b: (sub(a, b),), (5, 3)) == (2,)


def test_the_reuse_branch_contains_no_operation_of_a_block():
    graph = cached_graph(DualStream(), Bn_compute_blocks=1).found.gm
    targets = [node.target for node in graph.reuse_0.graph.nodes if node.op not in ("placeholder", "output")]
    assert targets == [torch.add, torch.add]


@pytest.mark.parametrize(("model", "fields"), CASES)
def test_a_computed_step_matches_the_original_graph_bitwise(model, fields):
    captured = cached_graph(model(), **fields)
    step = HandStep(captured.found.regions)
    (output,) = captured.found.gm(step, *captured.arguments)
    assert_bitwise(output, captured.output[0])
    assert len(step.probes) == 1 and set(step.updates) == {0}


@pytest.mark.parametrize(("model", "fields"), [case for case in CASES if case.id[0] in "0123"])
def test_a_reused_step_matches_the_reference_bitwise(model, fields):
    model = model().eval()
    inputs = [make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8))]
    captured = cached_graph(model, inputs[0], **fields)
    computed = HandStep(captured.found.regions)
    captured.found.gm(computed, *captured.arguments)
    reused = HandStep(captured.found.regions, computed.updates)
    (output,) = captured.found.gm(reused, *captured.arguments_with(*inputs))

    returns = {"DualBlock": 2, "DualBlockEncoderFirst": 2}.get(type(model.blocks[0]).__name__, 1)
    names = ("hidden_states", "encoder_hidden_states")[:returns]
    names = names[::-1] if "EncoderFirst" in type(model.blocks[0]).__name__ else names
    settings = {"Fn_compute_blocks": 1, **fields, "residual_diff_threshold": 1e9, "max_warmup_steps": 1}
    with ReferenceCache(model, [(block, names) for block in model.blocks], **settings) as reference:
        expected = [reference("only", **one) for one in inputs][1]
        residual = reference._state.first_residual
    assert reference.records[1].reused
    assert_bitwise(output, expected)
    assert_bitwise(computed.updates[0][0], residual)
    assert not torch.equal(output, model(**inputs[1])[0])


def test_the_probe_vector_has_the_residual_diff_and_the_timestep():
    model = Transformer().eval()
    inputs = [make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8))]
    captured = cached_graph(model, inputs[0])
    first = HandStep(captured.found.regions)
    captured.found.gm(first, *captured.arguments)
    second = HandStep(captured.found.regions, first.updates)
    captured.found.gm(second, *captured.arguments_with(*inputs))
    streams = [model.x_embedder(one["hidden_states"]) for one in inputs]
    before, now = (
        model.blocks[0](stream, model.embed_time(one["timestep"])) - stream
        for stream, one in zip(streams, inputs, strict=True)
    )
    diff = ((now - before).abs().mean() / before.abs().mean()).item()
    assert second.probes == [[diff, pytest.approx(0.8)]]


@pytest.mark.parametrize("regions", ["merged", "per_list"])
def test_every_region_of_flux_has_a_conditional(regions):
    model, inputs = FLUX.build(), [flux_inputs(), flux_inputs(2, 0.8)]
    captured = cached_graph(model, inputs[0], regions=regions)
    names = ["head", "compute_0", "reuse_0", "tail"]
    if regions == "per_list":
        names[3:3] = ["between_0", "compute_1", "reuse_1"]
    assert sorted(segments_of(captured.found)) == sorted(names)
    step = HandStep(captured.found.regions)
    assert_bitwise(captured.found.gm(step, *captured.arguments)[0], captured.output[0])
    assert [len(probe) for probe in step.probes] == [2, 1][: len(captured.found.regions)]  # The timestep is read once.
    again = HandStep(captured.found.regions, step.updates)
    (same,) = captured.found.gm(again, *captured.arguments)
    # The inputs are the same: a residual is added to the value it was computed from, so only rounding differs.
    assert [probe[0] for probe in again.probes] == pytest.approx([0.0] * len(again.probes), abs=1e-6)
    torch.testing.assert_close(same, captured.output[0], rtol=0, atol=1e-5)


# Dedupe.


def split(model: nn.Module, inputs: dict[str, Any] | None = None, *, share: bool, free: bool = True, **fields: Any):
    """Splits the cached graph, and puts every piece in all places where it is called, as compilation does."""

    def put(captured: Captured) -> list[Piece]:
        context = PassContext(CacheConfig(compile_blocks="once" if share else "inline"), exact=not free)
        SplitPieces(context)(captured.found.gm)
        for piece in context.pieces:
            for segment, name in piece.calls:
                segment.set_submodule(name, piece.gm)
        return list(context.pieces)

    captured = cached_graph(model, inputs, **fields)
    pieces = put(captured)
    (output,) = captured.found.gm(HandStep(captured.found.regions), *captured.arguments)
    return pieces, output, captured


def blocks_in(pieces: list[Piece]) -> list[list[int]]:
    return sorted(piece.blocks for piece in pieces if piece.blocks)


def test_flux_is_split_into_one_block_piece_per_list_and_the_two_halves_of_its_first_block():
    """The text output of the first block is read only in the region."""
    pieces, output, captured = split(FLUX.build(), flux_inputs(), share=True)
    assert blocks_in(pieces) == [[0], [0], [1, 2], [3, 4, 5, 6]]
    assert [len(piece.calls) for piece in pieces if piece.blocks] == [1, 1, 2, 4]
    # Copying a strided input changes the order of summation in matrix products.
    torch.testing.assert_close(output, captured.output[0], rtol=0, atol=1e-5)


def test_with_unchanged_strides_sharing_is_bitwise_exact_and_first_blocks_are_not_shared():
    pieces, output, captured = split(FLUX.build(), flux_inputs(), share=True, free=False)
    assert {*chain.from_iterable(blocks_in(pieces))} == {*range(7)}
    assert 2 <= len(blocks_in(pieces)) <= 5
    assert_bitwise(output, captured.output[0])


@pytest.mark.parametrize(("model", "fields"), [case for case in CASES if not case.id.endswith("block")])
def test_blocks_of_equal_structure_share_a_piece_and_compute_the_same(model, fields):
    pieces, output, captured = split(model(), share=True, **fields)
    assert {*chain.from_iterable(blocks_in(pieces))} == {*range(DEPTH)}
    # The last block may return fewer values, and the first one may be split into two halves.
    assert len(blocks_in(pieces)) <= 4
    assert_bitwise(output, captured.output[0])


@pytest.mark.parametrize("regions", ["merged", "per_list"])
def test_without_sharing_every_segment_is_one_piece(regions):
    pieces, output, captured = split(FLUX.build(), flux_inputs(), share=False, free=False, regions=regions)
    segments = segments_of(captured.found)
    calls = [segment for piece in pieces for segment, _ in piece.calls]
    assert len(calls) == len(segments) and {*map(id, calls)} == {*map(id, segments.values())}
    assert not blocks_in(pieces)
    assert_bitwise(output, captured.output[0])


class ScaledBlock(SelfBlock):
    def __init__(self, scale: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = scale
        self.norm.norm.eps = eps

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return super().forward(hidden_states, temb) * self.scale


@pytest.mark.parametrize("make", [lambda odd: ScaledBlock(0.5 + odd), lambda odd: ScaledBlock(1.5, 1e-5 + odd)],
                         ids=["factor", "eps"])  # fmt: skip
def test_blocks_with_different_constants_are_not_shared(make):
    odd = iter([0.0, 1.0, 0.0, 1.0])
    pieces, output, captured = split(Transformer(lambda: make(next(odd))), share=True)
    assert blocks_in(pieces) == [[0, 2], [1, 3]]
    assert_bitwise(output, captured.output[0])


def tie_between_blocks(model: Transformer) -> None:
    model.blocks[2].mlp = model.blocks[1].mlp
    model.blocks[3].attn.to_q.weight = model.blocks[1].attn.to_q.weight


def repeat_a_block(model: Transformer) -> None:
    for i in (1, 2, 3):
        model.blocks[i] = model.blocks[0]


@pytest.mark.parametrize(
    "tie", [lambda model: None, tie_between_blocks, repeat_a_block], ids=["different", "tied", "one"]
)
def test_blocks_share_a_piece_whether_their_weights_are_tied_or_not(tie):
    model = Transformer()
    tie(model)
    pieces, output, captured = split(model, share=True)
    assert blocks_in(pieces) == [[0, 1, 2, 3]]
    assert_bitwise(output, captured.output[0])


def test_a_block_that_uses_one_weight_twice_is_not_shared():
    model = Transformer()
    model.blocks[1].attn.to_out.weight = model.blocks[1].attn.to_q.weight
    pieces, output, captured = split(model, share=True)
    assert blocks_in(pieces) == [[0, 2, 3], [1]]
    assert_bitwise(output, captured.output[0])


def test_numbers_that_are_lifted_with_dynamic_sizes_do_not_prevent_caching():
    """An ahead-of-time compiler asks Dynamo to specialise the `eps` of a norm. The blocks of ConsisID get a slice."""
    variant = VARIANTS["ConsisID"]
    module, plain = variant.build(), variant.build()
    cachedit_fx.enable_cache(module, inner_backend="aot_eager", on_no_match="raise", dynamic=True)
    with torch.no_grad():
        found, expected = module(**variant.inputs())[0], plain(**variant.inputs())[0]
    assert cachedit_fx.is_cached(module)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # `aot_eager` decomposes: rounding in float32.
