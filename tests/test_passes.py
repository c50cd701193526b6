"""The passes in order, from a captured graph to its regions and to the cached graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.passes.analysis.cut_regions import cut_regions
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.locate_blocks import locate_blocks
from cachedit_fx.passes.analysis.make_plan import group_lists
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN
from cachedit_fx.patterns.declaration import Declaration
from tests.models import FLUX
from tests.reference import ReferenceCache
from tests.synthetic import (
    BATCH,
    CHANNELS,
    IMAGE,
    WIDTH,
    Captured,
    CrossBlock,
    DualStream,
    Emitting,
    SelfBlock,
    TextTransformer,
    Transformer,
    capture,
    capture_plan,
    make_inputs,
)
from tests.variants import Variant, planned


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def flux_inputs(seed: int = 1, time: float = 0.9) -> dict[str, Any]:
    prompt = FLUX.prompt(1).cond
    return dict(hidden_states=FLUX.latents(seed), timestep=torch.full((BATCH,), time), return_dict=False, **prompt)


@pytest.fixture(scope="module")
def flux() -> Captured:
    """The plan of a FLUX with 3 double and 4 single blocks; the first double block is in the head."""
    with torch.no_grad():
        return capture_plan(FLUX.build(), flux_inputs())


def paths_of(model: nn.Module) -> list[str]:
    """Paths of all located block lists that carry a stream."""
    analyse: Callable[[fx.GraphModule], Any] = lambda gm: locate_blocks(Program(gm.graph))  # noqa: E731
    return [blocks.path for blocks in capture(model.eval(), make_inputs(model), analyse).found if blocks.has_stream]


# Locate.


def test_flux_has_two_block_lists_without_gaps(flux):
    double, single = (match.blocks for match in flux.found.chain)
    assert (double.path, single.path) == ("transformer_blocks", "single_transformer_blocks")
    assert [block.path for block in single.blocks] == [f"single_transformer_blocks.{i}" for i in range(4)]
    assert {block.cls.__name__ for block in double.blocks} == {"FluxTransformerBlock"}
    for blocks in (double, single):
        for block, following in zip(blocks.blocks, blocks.blocks[1:], strict=False):
            assert block.start < block.end <= block.span_end == following.start
        assert blocks.blocks[-1].span_end == blocks.blocks[-1].end
    assert double.blocks[-1].end <= single.blocks[0].start


def test_both_streams_of_flux_cross_every_block_boundary(flux):
    for blocks in (match.blocks for match in flux.found.chain):
        assert len(blocks.boundaries) == len(blocks.blocks) + 1
        assert all(set(boundary) == {HIDDEN, ENCODER} for boundary in blocks.boundaries[:-1])
        for boundary, block in zip(blocks.boundaries[1:], blocks.blocks, strict=True):
            for role, node in boundary.items():
                assert block.start <= flux.found.program.position[node] < block.span_end
                assert re.fullmatch(role + r"(_\d+)?", node.name)
    assert set(flux.found.chain[1].blocks.boundaries[-1]) == {HIDDEN}  # The text stream ends here.


def test_the_nodes_of_a_block_are_tagged_with_its_number(flux):
    tags = [node.meta["cachedit_block"] for node in flux.found.program.nodes if "cachedit_block" in node.meta]
    assert tags == sorted(tags)
    assert set(tags) == set(range(7))


class NestedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfBlock() for _ in range(2))

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, temb)
        return hidden_states


def test_lists_inside_blocks_are_not_block_lists():
    paths = paths_of(Transformer(NestedBlock))
    assert "blocks" in paths
    assert not [path for path in paths if path.startswith("blocks.")]


class CaptionProjections(TextTransformer):
    """Every block has a separate projection of the text; the projections are in a list."""

    def __init__(self) -> None:
        super().__init__(CrossBlock)
        self.context_embedder = nn.ModuleList(nn.Linear(12, WIDTH) for _ in self.blocks)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        captions = [project(encoder_hidden_states) for project in self.context_embedder]
        for caption, block in zip(captions, self.blocks, strict=True):
            hidden_states = block(hidden_states, caption, temb)
        return self.unembed(hidden_states, temb)


def test_similar_modules_that_pass_no_stream_are_not_a_chain():
    assert "context_embedder" not in paths_of(CaptionProjections())
    assert [match.blocks.path for match in planned(CaptionProjections()).chain] == ["blocks"]


# Join. A variant of `Transformer` that only treats its stream differently overrides `loop`.


class Refined(Variant):
    """Two lists, one after the other, with a scaling and a permutation of the tokens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(SelfBlock() for _ in range(2))

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        hidden_states = hidden_states.transpose(0, 1).contiguous().transpose(0, 1)
        for block in self.refiner:
            hidden_states = block(hidden_states, temb)
        return hidden_states


class Controlled(Transformer):
    """A second list runs on a control signal; its results are added to the stream of the first."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once
        self.control_embedder = nn.Linear(CHANNELS, WIDTH)
        self.control_blocks = nn.ModuleList(SelfBlock() for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, control: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        control = self.control_embedder(control)
        hints = []
        for block in self.control_blocks:
            control = block(control, temb)
            hints.append(control)
        if self.at_once:
            hidden_states = hidden_states + control
            hints.clear()
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
            if hints:
                hidden_states = hidden_states + hints.pop()
        return self.unembed(hidden_states, temb)


def test_lists_that_share_a_stream_are_joined():
    found = planned(Refined())
    assert [match.blocks.path for match in found.chain] == ["blocks", "refiner"]
    assert [region.name for region in found.regions] == ["blocks[1:4]+refiner"]


@pytest.mark.parametrize("at_once", [False, True], ids=["after-blocks", "before-the-first"])
def test_a_list_whose_outputs_are_only_added_to_the_stream_is_not_joined(at_once):
    model = Controlled(at_once=at_once)
    inputs = {**make_inputs(model), "control": torch.randn(BATCH, IMAGE, CHANNELS)}
    assert [match.blocks.path for match in planned(model, inputs).chain] == ["blocks"]


# Cut.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [("transformer_blocks[1:3]+single_transformer_blocks", 1, 7)]),
        ({"Bn_compute_blocks": 1}, [("transformer_blocks[1:3]+single_transformer_blocks[0:3]", 1, 6)]),
        ({"Fn_compute_blocks": 3}, [("single_transformer_blocks", 3, 7)]),
        ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 4}, [("transformer_blocks[2:3]", 2, 3)]),
        ({"Fn_compute_blocks": 5, "Bn_compute_blocks": 1}, [("single_transformer_blocks[2:3]", 5, 6)]),
        ({"regions": "per_list"}, [("transformer_blocks[1:3]", 1, 3), ("single_transformer_blocks[1:4]", 4, 7)]),
    ],
)
def test_fn_and_bn_place_the_cuts_in_the_joined_chain(flux, fields, expected):
    config = CacheConfig(**{"Fn_compute_blocks": 1, **fields})
    regions = cut_regions(flux.found.program, group_lists(flux.found.program, flux.found.chain, config, Declaration()))
    assert [(region.name, region.first, region.last) for region in regions] == expected
    blocks = [block for match in flux.found.chain for block in match.blocks.blocks]
    for region in regions:
        inside = {node.meta["cachedit_block"] for node in region.nodes if "cachedit_block" in node.meta}
        assert inside == set(range(region.first, region.last))
        assert flux.found.program.position[region.nodes[0]] >= blocks[region.first].start


@pytest.mark.parametrize(("fn", "bn", "name"), [(1, 0, "blocks[1:4]"), (1, 1, "blocks[1:3]"), (2, 1, "blocks[2:3]")])
def test_streams_are_paired_across_the_region(fn, bn, name):
    (region,) = planned(DualStream(), Fn_compute_blocks=fn, Bn_compute_blocks=bn).regions
    assert region.name == name
    roles = [HIDDEN, ENCODER] if bn else [HIDDEN]  # Without Bn blocks the text is not read after the region.
    assert {pair.role for pair in region.live_outs} == set(roles)
    assert all(pair.before is not None for pair in region.live_outs)


def test_a_value_that_blocks_emit_is_cached_without_a_residual():
    (region,) = planned(Emitting()).regions
    stream, emitted = sorted(region.live_outs, key=lambda pair: pair.before is None)
    assert (stream.role, emitted.before) == (HIDDEN, None)
    assert emitted.after.name.startswith(ENCODER)


class AddsBetween(Variant):
    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
            hidden_states = hidden_states - temb.unsqueeze(1)
        return hidden_states


def test_operations_between_two_blocks_belong_to_the_first_one():
    (region,) = planned(AddsBetween(), Fn_compute_blocks=2, Bn_compute_blocks=1).regions
    subtractions = [node for node in region.nodes if node.target is operator.sub]
    assert region.probed_at.target is operator.sub and region.probed_at not in region.nodes
    assert len(subtractions) == 1
    assert [pair.after for pair in region.live_outs] == subtractions
    assert subtractions[0] is region.nodes[-1]


class SliceBlock(SelfBlock):
    def forward(self, hidden_states: Tensor, temb: Tensor, shift: Tensor) -> Tensor:
        return super().forward(hidden_states + shift.unsqueeze(1), temb)


class Slices(Variant):
    """Each block's shift is made from the time embedding just before the block."""

    block_class = SliceBlock

    def __init__(self) -> None:
        super().__init__()
        self.to_shifts = nn.Linear(WIDTH, len(self.blocks) * WIDTH)

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shifts = self.to_shifts(temb).unflatten(-1, (len(self.blocks), WIDTH))
        for i, block in enumerate(self.blocks):
            shift = F.silu(shifts[:, i])
            hidden_states = block(hidden_states, temb, shift)
        return hidden_states


def test_a_value_that_depends_on_no_stream_is_hoisted_if_a_bn_block_needs_it():
    (region,) = planned(Slices(), Bn_compute_blocks=1).regions
    assert [node.target for node in region.hoisted] == [operator.getitem, F.silu]
    assert not set(region.hoisted) & set(region.nodes)
    assert [pair.role for pair in region.live_outs] == [HIDDEN]


class Skips(Variant):
    """The output of one block is read again after the last block."""

    def __init__(self, source: int) -> None:
        super().__init__()
        self.source = source

    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, temb)
            if i == self.source:
                skip = hidden_states.tanh()
        return hidden_states + skip


def test_a_skip_from_an_fn_block_bypasses_the_region():
    (region,) = planned(Skips(source=0), Bn_compute_blocks=1).regions
    assert [pair.role for pair in region.live_outs] == [HIDDEN]
    assert not [node for node in region.nodes if node.target == "tanh"]


def test_a_skip_out_of_the_region_is_cached_without_a_residual():
    (region,) = planned(Skips(source=1), Bn_compute_blocks=1).regions
    values = [pair for pair in region.live_outs if pair.before is None]
    assert [pair.role for pair in region.live_outs if pair.before is not None] == [HIDDEN]
    assert [pair.after.target for pair in values] == ["tanh"]


@pytest.mark.parametrize(
    "model", [Slices, Refined, lambda: Skips(source=0)], ids=["slices", "refined", "skip-from-fn-block"]
)
def test_computed_and_reused_steps_around_a_cut_match_the_reference_bitwise(model):
    model = model().eval()
    fields = dict(Fn_compute_blocks=1, Bn_compute_blocks=1, residual_diff_threshold=1e9, max_warmup_steps=1)
    config = CacheConfig(**fields, forecaster=None, inner_backend="eager", on_no_match="raise")
    module = torch.compile(model, backend=cachedit_fx.Backend(config), fullgraph=True)
    steps = [make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8), (3, 0.7))]
    outputs = [module(**inputs)[0] for inputs in steps]
    blocks = [*model.blocks, *getattr(model, "refiner", ())]
    with ReferenceCache(model, [(block, ("hidden_states",)) for block in blocks], **fields) as reference:
        for inputs, output in zip(steps, outputs, strict=True):
            torch.testing.assert_close(output, reference("only", **inputs), rtol=0, atol=0)
    assert [record.reused for record in reference.records] == [False, True, True]
