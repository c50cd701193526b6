"""The probe: the residual of the Fn blocks, the modulated input of the first block, or none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.passes.analysis.find_probe import Probe, per_sample
from cachedit_fx.passes.extract import extract
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Group, Region
from cachedit_fx.passes.transforms.append_probe import append_diff, append_distance
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch
from tests.synthetic import PATTERNS, AdaNorm, DualStream, SelfBlock, Transformer, capture_plan, make_inputs, plan
from tests.test_reach_output import Step, cached_graph
from tests.zoo import VARIANTS

MODULATED: dict[str, Any] = dict(Fn_compute_blocks=0, probe="modulated_input", reach="blocks")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def planned(model: nn.Module, **fields: Any) -> Plan:
    found = plan(model.eval(), make_inputs(model), **MODULATED | fields)
    assert isinstance(found, Plan), found
    return found


def modulated_of(model: Transformer, hidden_states: Tensor, timestep: Tensor, **_: Tensor) -> Tensor:
    return model.blocks[0].norm(model.x_embedder(hidden_states), model.embed_time(timestep))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_the_first_blocks_modulated_input_is_the_probe(number: int):
    model = PATTERNS[number]().eval()
    inputs = [make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8))]
    captured = cached_graph(model, inputs[0], **MODULATED)
    first = Step(captured.found.regions)
    computed = captured.found.gm(first, *captured.arguments)
    torch.testing.assert_close(computed, captured.output, rtol=0, atol=0)
    second = Step(first.regions, first.updates)
    captured.found.gm(second, *captured.arguments_with(*inputs))
    before, now = (modulated_of(model, **one) for one in inputs)
    torch.testing.assert_close(first.updates[0][0], before, rtol=0, atol=0)
    torch.testing.assert_close(second.updates[0][0], now, rtol=0, atol=0)
    diff = (now - before).abs().mean() / before.abs().mean()
    assert second.probes[0].tolist() == pytest.approx([diff.item(), 0.8])


def test_only_the_operations_of_the_probe_run_before_the_region():
    found = planned(DualStream())
    (region,) = found.regions
    assert (region.name, region.first, region.last) == ("blocks", 0, 4) and region.probed_since is None
    assert {node.meta["cachedit_block"] for node in region.hoisted} == {0}
    heavy = [n for n in region.hoisted if found.program.flops[found.program.position[n]]]
    assert len(heavy) == 1  # The projection of the time embedding to shift and scale.
    assert region.probed_at in region.hoisted and not set(region.hoisted) & set(region.nodes)


def test_the_modulated_input_can_be_the_probe_with_fn_blocks():
    (region,) = planned(DualStream(), Fn_compute_blocks=2, Bn_compute_blocks=1).regions
    (other,) = planned(DualStream()).regions
    assert region.name == "blocks[2:3]" and region.probed_at.name == other.probed_at.name and not region.hoisted


class Late(SelfBlock):
    """Its attention reads the stream without modulation; only the input of the MLP is modulated."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(hidden_states, hidden_states)
        return hidden_states + self.mlp(self.norm(hidden_states, temb))


class Unread(SelfBlock):
    """The stream is modulated by its own mean; only the dtype of the timestep is used."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        normed = self.norm(hidden_states, hidden_states.mean(1)).type_as(temb)
        hidden_states = hidden_states + self.attn(normed, normed)
        return hidden_states + self.mlp(hidden_states)


class Plain(AdaNorm):
    """Casts the time embedding to the dtype of the stream, which does not count as a use of the stream."""

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        return super().forward(tokens, temb.type_as(tokens).to(tokens))


def test_an_argument_that_only_provides_a_dtype_does_not_count_as_a_use():
    model = Transformer()
    model.blocks[0].norm = Plain()
    assert "norm" in str(planned(model).regions[0].probed_at.meta["nn_module_stack"])


class WithoutTimestep(Transformer):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return super().forward(hidden_states, hidden_states.mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Transformer(Late), r"a tensor in blocks\.0 .* modulated by l_timestep_, before the first matrix product"),
        (Transformer(Unread), r"a tensor in blocks\.0 .* modulated by"),
        (WithoutTimestep(), r"a timestep among the inputs of the graph \(probe='modulated_input'\)"),
    ],
    ids=["late", "unread", "without-timestep"],
)
def test_a_block_without_a_modulated_input_is_refused(model: nn.Module, expected: str):
    (mismatch,) = plan(model.eval(), make_inputs(model), **MODULATED)
    assert isinstance(mismatch, Mismatch) and mismatch.cause is Cause.NO_PROBE
    assert re.search(expected, mismatch.expected) and "probe='fn_residual'" in mismatch.cure


class Autocast(SelfBlock):
    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(hidden_states, temb)


def test_a_modulated_input_computed_in_a_context_is_refused():
    model = Transformer(Autocast)
    (mismatch,) = plan(model.eval(), make_inputs(model), **MODULATED)
    assert mismatch.cause is Cause.STATE and "the modulated input" in mismatch.expected


@pytest.mark.parametrize("probe", ["none", "timestep"])
def test_without_a_probe_only_the_timestep_is_read(probe: str):
    model = DualStream().eval()
    captured = cached_graph(model, make_inputs(model), Fn_compute_blocks=1, probe=probe, reach="blocks")
    step = Step(captured.found.regions)
    captured.found.gm(step, *captured.arguments)
    assert captured.found.regions[0].probed_at is None
    assert step.probes[0].tolist() == pytest.approx([0.9]) and step.updates[0][0] is None


# Decisions per sample.


def diff_of(now: Tensor, before: Tensor, sample_dim: int | None) -> Tensor:
    """The diff that the head of a graph computes for a given value."""
    graph = fx.Graph()
    node = graph.placeholder("now")
    node.meta["example_value"] = now
    moved = graph.call_method("clone", (node,))
    moved.meta["example_value"] = now
    head = extract([moved])
    region = Region("region", 0, 1, (), None, moved, None, (), (), sample_dim=sample_dim)
    parts, _, _ = append_distance(head, region)
    diff = append_diff(head, region, *parts)
    return head.finish(fx.GraphModule(nn.Module(), fx.Graph()), [diff], "Head")(now, before)[0]


def test_the_diff_is_the_largest_diff_of_any_sample():
    before, now = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    by_hand = [((n - b).abs().mean() / b.abs().mean()).item() for n, b in zip(now, before, strict=True)]
    assert diff_of(now, before, 0).item() == pytest.approx(max(by_hand))
    swapped = diff_of(now.transpose(0, 1), before.transpose(0, 1), 1)
    assert swapped.item() == pytest.approx(max(by_hand)) and swapped.shape == ()
    whole = ((now - before).abs().mean() / before.abs().mean()).item()
    assert diff_of(now, before, None).item() == pytest.approx(whole) and whole < max(by_hand)


def test_nan_in_one_sample_is_nan():
    before, now = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    now[1, 2, 3] = torch.nan
    assert diff_of(now, before, 0).isnan()


@pytest.mark.parametrize(
    ("fields", "dim"),
    [
        (dict(batch_decision="any"), 0),
        (dict(batch_decision="any", Fn_compute_blocks=1, probe="fn_residual"), 0),
        (dict(batch_decision="any", cache_type="DBPrune", probe="fn_residual"), 0),
        (dict(batch_decision="mean"), None),
        (dict(batch_decision="any", probe="none"), None),
    ],
)
def test_samples_lie_along_the_first_dimension(fields: dict[str, Any], dim: int | None):
    assert {region.sample_dim for region in planned(Transformer(), **fields).regions} == {dim}


def node_of(*shape: int) -> fx.Node:
    node = fx.Graph().placeholder("value")
    node.meta["example_value"] = torch.empty(shape)
    return node


@pytest.mark.parametrize(
    ("probed", "timestep", "dim"),
    [
        ((2, 6, 4), (2,), 0),
        ((6, 2, 4), (2,), 1),  # Tokens first.
        ((6, 5, 4), (2,), 0),  # Frames are a part of the batch.
        ((2, 6, 4), (), 0),
        ((2, 6, 4), None, 0),
        ((6, 4), (2,), None),  # The tokens of one sample.
    ],
)
def test_the_sample_dimension_has_as_many_elements_as_there_are_timesteps(
    probed: tuple[int, ...], timestep: tuple[int, ...] | None, dim: int | None
):
    group = Group((), CacheConfig(batch_decision="any"))
    timestep_node = node_of(*timestep) if timestep is not None else None
    assert per_sample(Probe(node_of(*probed)), group, timestep_node).sample_dim == dim


# Real models.


@pytest.mark.parametrize(
    "name", ["SD3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("QwenImage", "Wan", "HunyuanVideo"))]
)
def test_real_blocks_have_a_modulated_input(name: str):
    variant = VARIANTS[name]
    found = capture_plan(variant.build(), variant.inputs(), **MODULATED).found
    assert isinstance(found, Plan), found
    (region,) = found.regions
    stream = found.chain[0].blocks.boundaries[0]["hidden_states"].meta["example_value"]
    assert region.probed_at.meta["example_value"].shape == stream.shape
    assert all(found.program.position[node] <= found.program.position[region.probed_at] for node in region.hoisted)


def test_explain_names_the_probe():
    model = DualStream().eval()
    config = CacheConfig(**MODULATED, batch_decision="any")
    explanation = cachedit_fx.explain(model, **make_inputs(model), cache_config=config)
    (region,) = explanation.graphs[0].regions
    words = (
        ", the input of the first block after its norm and the modulation by the timestep; each sample is compared "
        "separately"
    )
    assert region.probe.endswith(words) and words in str(explanation)
    saved, total = region.cost.flops, explanation.graphs[0].cost.flops
    assert saved < total and explanation.graphs[0].saved_flops == pytest.approx(saved / total)
