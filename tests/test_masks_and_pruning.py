"""Masks, refreshing and shared diffs from end to end, against plain-Python references.

With the inner backend "eager" the pieces run the model's own operations, so outputs are compared bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig
from cachedit_fx.passes.manager import plan_graph
from cachedit_fx.passes.plan import Plan
from tests import tiny
from tests.hybrid import calls, moving
from tests.regions import Decide, Span, assert_diffs, at_steps, runs, threshold
from tests.sessions import every_session
from tests.synthetic import capture, insert_conditionals
from tests.tiny import TIMES, Watch, assert_bitwise

STREAMS = ("hidden_states", "encoder_hidden_states")  # The outputs of a block of `tests.tiny`.
MASK = (1, 0, 0, 1, 0, 0, 1, 0)
STATIC = dict(Fn_compute_blocks=0, steps_computation_mask=MASK, steps_computation_policy="static")
Calls = list[dict[str, Tensor]]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def enabled(model: nn.Module | None = None, config: CacheConfig | None = None, **fields: Any) -> Any:
    model = model or tiny.build()
    config = (config or CacheConfig(forecaster=None)).override(inner_backend="eager", **fields)
    return cachedit_fx.enable_cache(model, config)


def outputs_of(model: nn.Module, given: Calls) -> list[Tensor]:
    return [model(**call)[0] for call in given]


def middle(decide: Decide, Fn: int = 1, Bn: int = 0) -> tuple[nn.Module, Span]:
    """A model of `tests.tiny` and its middle blocks."""
    model = tiny.build()
    first = model.blocks[0] if Fn else None
    return model, Span(model.blocks[Fn : 4 - Bn], STREAMS, decide, since=first)


# Static masks.


def cached_graph(model: nn.Module, **fields: Any) -> Any:
    """The cached graph, with one region."""

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        plan = plan_graph(gm, CacheConfig(inner_backend="eager", **fields))
        assert isinstance(plan, Plan), plan
        assert [region.name for region in plan.regions] == [
            "blocks" if not fields["Fn_compute_blocks"] else "blocks[1:4]"
        ]
        return insert_conditionals(plan).gm

    return capture(model, calls()[0], rewrite).found


def num_probed(gm: Any) -> int:
    """The number of values that the head passes to the host."""
    (stack,) = (node for node in gm.head.graph.nodes if node.target is torch.stack)
    return len(stack.args[0])


def test_a_static_mask_over_the_whole_chain_probes_only_the_timestep():
    gm = cached_graph(tiny.build(), **STATIC)
    assert num_probed(gm) == 1
    methods = [node.target for node in gm.graph.nodes if node.op == "call_method"]
    assert methods == ["decide", "cached", "update"]
    (update,) = (node for node in gm.graph.nodes if node.target == "update")
    assert update.args[2] is None
    assert not any(
        node.target in ("abs", "mean", torch.sub) for node in gm.head.graph.nodes if node.op != "placeholder"
    )
    probing = cached_graph(tiny.build(), **STATIC | {"Fn_compute_blocks": 1})
    assert num_probed(probing) == 2
    assert "before" in [node.target for node in probing.graph.nodes]


def test_a_static_mask_reuses_the_whole_chain_where_it_is_0():
    model = enabled(**STATIC)
    outputs = outputs_of(model, moving())
    (stats,) = every_session(model)
    assert (stats.region, stats.cached_steps, stats.residual_diffs) == ("blocks", [1, 2, 4, 5, 7], {})
    reference, span = middle(at_steps([0, 3, 6]), Fn=0)
    assert_bitwise(outputs, runs(reference, [span], moving()))


def test_a_static_mask_runs_no_block_on_a_reused_step():
    model = enabled(**STATIC)
    ran = []
    for call in moving():
        Watch.ran = 0
        model(**call)
        ran.append(Watch.ran)
    assert ran == [4 if computed else 0 for computed in MASK]


def test_a_static_mask_stores_only_one_residual_per_stream():
    model, given = enabled(**STATIC), moving()
    outputs_of(model, given[:2])
    (stats,) = every_session(model)
    assert stats.state_bytes == tiny.STREAM_BYTES + tiny.TEXT_BYTES


@pytest.mark.parametrize("Bn", [0, 1])
def test_a_static_mask_with_blocks_that_always_run(Bn):
    model = enabled(**STATIC | dict(Fn_compute_blocks=1, Bn_compute_blocks=Bn))
    outputs = outputs_of(model, moving())
    (stats,) = every_session(model)
    assert (stats.region, stats.cached_steps) == (f"blocks[1:{4 - Bn}]", [1, 2, 4, 5, 7])
    reference, span = middle(at_steps([0, 3, 6]), Bn=Bn)
    assert_bitwise(outputs, runs(reference, [span], moving()))


def test_a_dynamic_mask_probes_where_it_is_0():
    limit = 0.08
    model = enabled(**tiny.fields(steps_computation_mask=MASK))
    outputs = outputs_of(model, moving())
    (stats,) = every_session(model)
    probes = threshold(limit)
    reference, span = middle(lambda step, diff: bool(MASK[step]) or probes(step, diff))
    assert_bitwise(outputs, runs(reference, [span], moving()))
    assert stats.cached_steps == span.cached_steps
    assert 0 < len(stats.cached_steps) < MASK.count(0)
    assert set(stats.residual_diffs) == {step for step, computed in enumerate(MASK) if not computed}
    assert_diffs(stats, span, skipped=[0, 3, 6])


# Refreshes and new generations.


@pytest.mark.parametrize(
    ("policy", "expected", "reasons"),
    [
        ("once", [1, 4, 6], {3: "warmup", 6: "diff-below"}),
        ("repeat", [1, 4, 7], {3: "warmup", 6: "warmup"}),
    ],
)
def test_a_refresh_computes_and_warms_up_within_the_session(policy, expected, reasons):
    model = enabled(**tiny.fields(force_refresh_step_hint=3, force_refresh_step_policy=policy))
    outputs = outputs_of(model, calls())
    (stats,) = every_session(model)
    assert stats.cached_steps == expected
    assert {step: stats.decisions[step] for step in reasons} == reasons
    reference, span = middle(at_steps([step for step in range(8) if step not in expected]))
    assert_bitwise(outputs, runs(reference, [span], calls()))


def test_a_refresh_drops_the_cached_values():
    model = enabled(**tiny.fields(force_refresh_step_hint=3, max_warmup_steps=0))
    outputs_of(model, calls())
    (stats,) = every_session(model)
    assert [step for step, reason in enumerate(stats.decisions) if reason == "nothing-stored"] == [0, 3]


def test_after_num_inference_steps_a_new_generation_begins():
    """The timestep keeps falling and the prompt stays the same, so nothing else marks the new generation."""
    model = enabled(**tiny.fields(num_inference_steps=4))
    outputs = outputs_of(model, moving())
    found = every_session(model)
    assert [(stats.num_steps, stats.decisions[0]) for stats in found] == [(4, "warmup"), (4, "warmup")]
    expected = []
    for half in (moving()[:4], moving()[4:]):
        reference, span = middle(threshold(0.08))
        expected += runs(reference, [span], half)
        assert found[len(expected) // 4 - 1].cached_steps == span.cached_steps
    assert_bitwise(outputs, expected)


def test_num_inference_steps_does_not_extend_a_session():
    model = enabled(**tiny.fields(num_inference_steps=8))
    outputs_of(model, moving()[:3])
    outputs_of(model, moving()[:3])
    assert [stats.num_steps for stats in every_session(model)] == [3, 3]


# Guidance branches that share a diff.


def two_guidance_branches(
    declare: Callable[[nn.Module], Any] = lambda model: model, **fields: Any
) -> tuple[list[cachedit_fx.inspect.CacheStats], list[list[Tensor]]]:
    """Statistics and outputs of two interleaved branches, each with its own prompt and latents."""
    model = tiny.build()
    cachedit_fx.enable_cache(declare(model), tiny.config(**{"residual_diff_threshold": 0.06} | fields))
    given = moving(1), moving(2)
    outputs: list[list[Tensor]] = [[], []]
    for step in range(len(TIMES)):
        for guidance_branch in range(2):
            outputs[guidance_branch].append(model(**given[guidance_branch][step])[0])
    return every_session(model), outputs


def separate_by_adapter(model: nn.Module) -> BlockAdapter:
    return BlockAdapter(transformer=model, has_separate_cfg=True)


@pytest.mark.parametrize("declare", [lambda model: model, separate_by_adapter], ids=["model", "adapter"])
def test_a_guidance_branch_that_does_not_probe_uses_the_diff_of_the_previous_branch(declare):
    (cond, uncond), outputs = two_guidance_branches(declare, cfg_diff_compute_separate=False)
    assert uncond.residual_diffs == cond.residual_diffs != {}
    assert uncond.cached_steps == cond.cached_steps
    first, first_span = middle(threshold(0.06))
    expected = runs(first, [first_span], moving(1))
    assert cond.cached_steps == first_span.cached_steps != []
    second, second_span = middle(lambda step, _diff: not first_span.reused[step])
    assert_bitwise(outputs[0], expected)
    assert_bitwise(outputs[1], runs(second, [second_span], moving(2)))


SEPARATE = [
    pytest.param({}, id="by-default"),
    pytest.param({"cfg_diff_compute_separate": False, "enable_separate_cfg": False}, id="no-branches-declared"),
    pytest.param({"cfg_diff_compute_separate": False, "cfg_compute_first": True}, id="guidance-first"),
    pytest.param(
        {"cfg_diff_compute_separate": False, "enable_separate_cfg": False, "declare": separate_by_adapter},
        id="the-configuration-overrides-the-adapter",
    ),
]


@pytest.mark.parametrize("fields", SEPARATE)
def test_without_diff_sharing_every_guidance_branch_probes(fields):
    (cond, uncond), outputs = two_guidance_branches(**fields)
    for seed, stats, found in ((1, cond, outputs[0]), (2, uncond, outputs[1])):
        reference, span = middle(threshold(0.06))
        assert_bitwise(found, runs(reference, [span], moving(seed)))
        assert stats.cached_steps == span.cached_steps
        assert_diffs(stats, span)
    assert cond.residual_diffs != uncond.residual_diffs


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_continuous_cached_steps": 1}, [1, 3, 5, 7]),
        ({"max_cached_steps": 2}, [1, 2]),
        ({"max_accumulated_residual_diff_threshold": 1e-6}, [1, 3, 5, 7]),
    ],
)
def test_a_branch_with_a_shared_diff_has_its_own_limits(limits, expected):
    (cond, uncond), _ = two_guidance_branches(cfg_diff_compute_separate=False, residual_diff_threshold=0.9, **limits)
    assert cond.cached_steps == uncond.cached_steps == expected


def test_a_guidance_branch_that_starts_later_probes():
    model = enabled(**tiny.fields(cfg_diff_compute_separate=False))
    given = moving(1), moving(2)
    for step in range(len(TIMES)):
        model(**given[0][step])
        if step:
            model(**given[1][step])
    cond, uncond = every_session(model)
    reference, span = middle(threshold(0.08))
    runs(reference, [span], given[1][1:])
    assert uncond.cached_steps == span.cached_steps
    assert_diffs(uncond, span)
    assert cond.num_steps == uncond.num_steps + 1
