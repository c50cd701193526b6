"""A region that reaches to the output: a reused step returns the output of the last computed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.passes.analysis.cached_examples import cached_examples
from cachedit_fx.passes.manager import plan_graph
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch
from tests import tiny
from tests.models import FLUX, WAN, Family
from tests.synthetic import (
    PATTERNS,
    WIDTH,
    CachedGraph,
    Captured,
    DualStream,
    Transformer,
    capture,
    insert_conditionals,
    make_inputs,
    plan,
)

OUTPUT: dict[str, Any] = dict(Fn_compute_blocks=0, probe="none", reach="output")
MASK = dict(steps_computation_mask=[1, 0, 0, 1, 0], steps_computation_policy="static", forecaster=None)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Step:
    """A `Step` that reuses the given values, and computes a region that has none."""

    def __init__(self, regions: tuple[Region, ...], given: dict[int, Any] | None = None) -> None:
        self.regions, self.given = regions, given or {}
        self.updates: dict[int, Any] = {}
        self.probes: list[Tensor | None] = []

    def before(self, region: int) -> Tensor:
        example = cached_examples(self.regions[region])[0]
        return self.given[region][0] if region in self.given else torch.ones(example.shape, dtype=example.dtype)

    def decide(self, region: int, probe: Tensor | None) -> bool:
        self.probes.append(probe)
        return region not in self.given

    def cached(self, region: int) -> tuple[Tensor | None, ...]:
        return self.given[region][1] if region in self.given else (None,) * 9

    def update(self, region: int, probe: Tensor | None, cached: tuple[Tensor, ...]) -> None:
        self.updates[region] = (probe, cached)


def cached_graph(model: nn.Module, inputs: dict[str, Tensor], **fields: Any) -> Captured:
    def rewrite(gm):
        found = plan_graph(gm, CacheConfig(**OUTPUT | fields))
        assert isinstance(found, Plan), found
        return insert_conditionals(found)

    return capture(model.eval(), inputs, rewrite)


def two_steps(model: nn.Module, **fields: Any) -> tuple[CachedGraph, list[Any], list[Any], Any]:
    """Runs a computed step and, on other inputs, a reused one.

    Returns:
        The graph, the outputs of the two steps, and the output of the plain model for the second one.
    """
    inputs = [make_inputs(model, seed, time) for seed, time in ((1, 0.9), (2, 0.8))]
    captured = cached_graph(model, inputs[0], **fields)
    first = Step(captured.found.regions)
    computed = captured.found.gm(first, *captured.arguments)
    torch.testing.assert_close(computed, captured.output, rtol=0, atol=0)
    again = captured.arguments_with(*inputs)
    reused = captured.found.gm(Step(first.regions, first.updates), *again)
    return captured.found, computed, reused, model(**inputs[1])


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_reused_step_returns_the_output_of_the_computed_step(number: int):
    graph, computed, reused, plain = two_steps(PATTERNS[number]())
    torch.testing.assert_close(reused, computed, rtol=0, atol=0)
    assert not torch.equal(computed[0], plain[0])
    (region,) = graph.regions
    assert region.name == "blocks -> output"
    assert [(pair.role, pair.before) for pair in region.live_outs] == [("output", None)]
    assert not region.hoisted and region.probed_at is None


def test_a_reused_step_computes_only_the_timestep():
    graph, *_ = two_steps(DualStream())
    calls = {name: [n for n in part.graph.nodes if n.op.startswith("call")] for name, part in graph.gm.named_children()}
    assert len(calls["compute_0"]) > 100
    assert not calls["tail"] and [n.target for n in calls["reuse_0"]] == ["clone"]
    assert all("cachedit_probe" in node.meta for node in calls["head"])


def test_fn_blocks_still_run_and_are_probed():
    graph, computed, reused, _ = two_steps(DualStream(), Fn_compute_blocks=1, probe="fn_residual")
    torch.testing.assert_close(reused, computed, rtol=0, atol=0)
    (region,) = graph.regions
    assert region.name == "blocks[1:4] -> output" and region.probed_since is not None
    kinds = {node.meta["cachedit_block"] for node in region.deferred if "cachedit_block" in node.meta}
    assert kinds == {0}  # The first block's text.


class Returns(Transformer):
    """Returns `make(stream after the blocks, time embedding, stream before the blocks)`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        temb = self.embed_time(timestep)
        before = self.x_embedder(hidden_states)
        after = before
        for block in self.blocks:
            after = block(after, temb)
        return self.make(self.unembed(after, temb)[0], temb, hidden_states)


def test_an_output_that_does_not_depend_on_the_blocks_is_computed_at_every_step():
    model = Returns(lambda out, temb, latents: (out, temb.sin(), latents[:, :2], out.mean()))
    graph, computed, reused, plain = two_steps(model)
    for i, is_of_blocks in enumerate((True, False, False, True)):
        torch.testing.assert_close(reused[i], computed[i] if is_of_blocks else plain[i], rtol=0, atol=0)
    (region,) = graph.regions
    assert [pair.role for pair in region.live_outs] == ["output_0", "output_1"]


def test_a_buffer_that_block_outputs_are_written_into_depends_on_the_blocks():
    def written(out, temb, latents):
        buffer = torch.zeros(2, 2 * out.shape[1], out.shape[2])
        buffer[:, : out.shape[1]] = out
        return (buffer.view(2, 2, -1),)

    _, computed, reused, _ = two_steps(Returns(written))
    torch.testing.assert_close(reused, computed, rtol=0, atol=0)


def test_a_change_of_an_output_by_the_caller_does_not_affect_later_steps():
    model = DualStream().eval()
    captured = cached_graph(model, make_inputs(model))
    first = Step(captured.found.regions)
    (output,) = captured.found.gm(first, *captured.arguments)
    wanted = output.clone()
    output.zero_()
    for _ in range(2):
        (again,) = captured.found.gm(Step(first.regions, first.updates), *captured.arguments)
        torch.testing.assert_close(again, wanted, rtol=0, atol=0)
        again.zero_()


class Prepares(Transformer):
    """Before its blocks, it fills a table in place and embeds the timestep in an autocast context."""

    def __init__(self, shares: bool = False) -> None:
        super().__init__()
        self.shares = shares

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        table = torch.zeros(WIDTH)
        table[::2] = 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            scale = timestep.float().exp()[:, None] * table
        table[1::2] = 2
        temb = self.embed_time(timestep) + scale + table
        out = super().unembed(self.blocks[1](self.blocks[0](self.x_embedder(hidden_states), temb), temb), temb)[0]
        return (out, scale) if self.shares else (out,)


def test_writes_and_contexts_are_deferred_as_a_whole():
    graph, computed, reused, _ = two_steps(Prepares())
    torch.testing.assert_close(reused, computed, rtol=0, atol=0)
    assert not [n for n in graph.gm.head.graph.nodes if n.op.startswith("call") and "cachedit_probe" not in n.meta]


def test_writes_and_contexts_are_not_split_if_their_result_is_returned():
    graph, computed, reused, plain = two_steps(Prepares(shares=True))
    torch.testing.assert_close(reused[0], computed[0], rtol=0, atol=0)
    torch.testing.assert_close(reused[1], plain[1], rtol=0, atol=0)
    names = [str(getattr(n.target, "__name__", n.target)) for n in graph.gm.head.graph.nodes if n.op.startswith("call")]
    assert names.count("setitem") == 2 and names.count("_enter_autocast") == names.count("_exit_autocast") == 1
    assert "linear" not in names


# Refusals.


def refusal(model: nn.Module, **fields: Any) -> Mismatch:
    found = plan(model.eval(), make_inputs(model), **OUTPUT | fields)
    assert isinstance(found, tuple), found
    return found[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Bn_compute_blocks": 1}, "expected: Bn_compute_blocks=0 with reach='output'; found: Bn_compute_blocks=1"),
        ({"cache_type": "DBPrune", "probe": "fn_residual"}, "expected: one region .* found: cache_type='DBPrune'"),
    ],
)
def test_reach_output_requires_certain_values_of_other_fields(fields: dict[str, Any], reason: str):
    mismatch = refusal(DualStream(), **fields)
    assert mismatch.cause is Cause.REACH
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(mismatch.reason)


def test_a_graph_whose_outputs_do_not_depend_on_its_blocks_is_refused():
    def apart(out, temb, latents):
        return (temb + 0 * latents.mean(),)

    mismatch = refusal(Returns(apart))
    assert mismatch.cause in (Cause.REACH, Cause.NO_CHAIN)


def test_outputs_whose_sizes_depend_on_data_are_refused():
    def picked(out, temb, latents):
        return (out[latents[..., 0] > 0],)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        mismatch = refusal(Returns(picked))
    assert mismatch.cause is Cause.REACH
    assert "whose sizes follow from those of the inputs" in mismatch.expected and "u0" in mismatch.found


def test_numbers_that_depend_on_the_blocks_are_refused():
    def counted(out, temb, latents):
        return out, out.argmax().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        mismatch = refusal(Returns(counted))
    assert mismatch.cause is Cause.REACH and "returns only tensors" in mismatch.expected


# Several lists, and real models.


def plan_lists(config: CacheConfig, declared: Declaration | None = None) -> tuple[Region, ...]:
    call = dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=torch.ones(tiny.BATCH))
    captured = capture(tiny.frozen(tiny.TwoLists()), call, lambda gm: plan_graph(gm, config, declared))
    assert isinstance(captured.found, Plan), captured.found
    return captured.found.regions


def test_only_the_last_of_several_groups_reaches_to_the_output():
    regions = plan_lists(CacheConfig(**OUTPUT, regions="per_list"))
    assert [region.name for region in regions] == ["blocks", "more -> output"]
    assert [region.reaches_output for region in regions] == [False, True]
    assert [pair.role for region in regions for pair in region.live_outs] == ["hidden_states", "output"]


def test_a_group_can_set_its_own_reach():
    overrides = tuple(CacheConfig(reach=reach).changes for reach in ("blocks", "output"))
    declared = Declaration(lists=("blocks", "more"), overrides=overrides)
    regions = plan_lists(CacheConfig(Fn_compute_blocks=0, probe="none"), declared)
    assert [region.reaches_output for region in regions] == [False, True]


def call_of(family: Family, seed: int = 1, sigma: float = 0.9) -> dict[str, Any]:
    time = torch.full((family.latents(seed).shape[0],), sigma * family.timestep_scale)
    return dict(hidden_states=family.latents(seed), timestep=time, return_dict=False, **family.prompt(1).cond)


@pytest.mark.parametrize("family", [WAN, pytest.param(FLUX, marks=pytest.mark.slow)], ids=["wan", "flux"])
def test_a_reused_step_of_a_real_model_returns_the_last_computed_output(family: Family):
    torch._dynamo.reset()
    model, common = family.build(), call_of(family)
    backend = cachedit_fx.Backend(CacheConfig(**OUTPUT | MASK, max_warmup_steps=1, inner_backend="eager"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    last = None
    for i, computes in enumerate(MASK["steps_computation_mask"]):
        current = call_of(family, seed=i, sigma=0.9 - 0.1 * i)
        call = common | {name: current[name] for name in ("hidden_states", "timestep")}
        output, plain = compiled(**call)[0], model(**call)[0]
        last = plain if computes else last
        torch.testing.assert_close(output, last, rtol=0, atol=0, msg=lambda text, i=i: f"step {i}: {text}")
        assert computes or not torch.equal(output, plain)


def test_explain_says_how_far_the_region_reaches():
    model = DualStream().eval()
    explanation = cachedit_fx.explain(model, **make_inputs(model), cache_config=CacheConfig(**OUTPUT | MASK))
    (region,) = explanation.graphs[0].regions
    assert region.name == "blocks -> output" and region.reaches_output
    assert region.probe == "none (a static mask decides)"
    assert explanation.graphs[0].saved_flops == pytest.approx(1)
    assert [cached.cached_as for cached in region.cached] == ["value"]
    assert "a reused step saves 100.0% of the FLOPs" in str(explanation)
    assert "-> output" in explanation.diff() or "reuse_0" in explanation.diff()
