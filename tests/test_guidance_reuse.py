"""Guidance reuse is compared with a plain-Python reference, in real pipelines and in loops of their own."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import Forecaster
from cachedit_fx.runtime.guidance_branch import set_label, within_guidance_branch
from tests import tiny
from tests.fast_dispatches import served
from tests.generations import NUM_STEPS, assert_bitwise, assert_same_decisions, outputs_of, settings
from tests.guided_reference import GuidedReference
from tests.models import QWEN_IMAGE, WAN, Family
from tests.sessions import every_session
from tests.test_forecast_runtime import Average, Line, by_line
from tests.tiny import TIMES

GUIDED = dict(guidance_reuse="difference")
SPEED = 0.01  # How far the latents move per step.
EVERY_STEP = [*range(len(TIMES))]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# Real pipelines.


def guided_reference(family: Family, **fields: Any) -> tuple[GuidedReference, list[Tensor]]:
    """One generation of the real pipeline by the reference, and the latents after every step."""
    model, branches = family.build(), itertools.cycle(family.guidance_branches)
    first_of = {"uncond": "cond"}
    with GuidedReference(model, family.chain(model), first_of=first_of, **settings(family) | fields) as reference:
        model.forward = reference.stand_in_for_forward(lambda: next(branches))
        latents = family.generate(family.pipeline(model), family.prompt(1), family.latents(1), NUM_STEPS)
    return reference, latents


LIMITS: dict[str, dict[str, Any]] = {
    "continuous": {"max_continuous_guidance_steps": 1},
    "mask": {"guidance_computation_mask": (1, 0) + (1,) * NUM_STEPS},
    "below": {"guidance_reuse_threshold": 1.0},
    "above": {"guidance_reuse_threshold": 0.001},
}


@pytest.mark.parametrize("family", [WAN, QWEN_IMAGE], ids=["wan", "qwen-image"])
def test_a_real_pipeline_matches_the_reference_bitwise(family: Family):
    model = family.build()
    pipe = family.pipeline(model)
    cachedit_fx.enable_cache(pipe, CacheConfig(**settings(family), inner_backend="eager", **GUIDED))
    reasons = set()
    for limits in LIMITS.values():
        reference, expected = guided_reference(family, **limits)
        cachedit_fx.reset(model)
        defaults = {name: getattr(CacheConfig(), name) for one in LIMITS.values() for name in one}
        cachedit_fx.refresh_context(pipe, **defaults | limits)
        latents = family.generate(pipe, family.prompt(1), family.latents(1), NUM_STEPS)
        assert_bitwise(latents, expected)
        cond, uncond = every_session(model)
        assert_same_decisions(cond, reference.of("cond"))
        assert_same_decisions(uncond, reference.of("uncond"))
        assert not cond.guided_steps
        reasons |= {*uncond.decisions}
    assert {"guidance", "guidance-continuous", "guidance-mask", "guidance-above", "diff-below"} <= reasons


# Loops of their own, with a model whose only live-out is the hidden stream.


@dataclass
class Loop:
    """A denoising loop of one request, with one call per guidance branch and step.

    Attributes:
        call: The model.
        order: The guidance branches in the order of their calls.
        around: The context of the calls of a guidance branch.
    """

    call: Callable[..., Tensor]
    seed: int = 1
    order: Sequence[str] = ("cond", "uncond")
    around: Callable[[str], Any] = lambda _branch: nullcontext()
    times: Sequence[float] = TIMES

    def __iter__(self) -> Iterator[list[Tensor]]:
        """The outputs of every step, in the order of the calls."""
        prompts = {branch: tiny.prompt(10 * self.seed + i) for i, branch in enumerate(sorted(self.order))}
        latents = tiny.latents(self.seed)
        for timestep in self.times:
            outputs = []
            for branch in self.order:
                with self.around(branch):
                    outputs.append(self.call(branch, prompts[branch], timestep, latents))
            latents = latents - SPEED * (outputs[0] + outputs[-1])
            yield outputs


def hidden_only() -> tiny.TwoLists:
    """A model with the same weights every time, whose only live-out is the hidden stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.frozen(tiny.TwoLists())


def in_session(key: str) -> Callable[[str], Any]:
    return lambda _branch: cachedit_fx.session(key)


def enabled(model: nn.Module | None = None, **fields: Any) -> nn.Module:
    model = hidden_only() if model is None else model
    given = tiny.fields(**dict(residual_diff_threshold=0.08, inner_backend="eager") | GUIDED | fields)
    return cachedit_fx.enable_cache(model, CacheConfig(**given))


def called(model: nn.Module) -> Callable[..., Tensor]:
    return lambda _branch, *inputs: tiny.step(model, *inputs)


def run(model: nn.Module, **loop: Any) -> list[Tensor]:
    return [output for outputs in Loop(called(model), **loop) for output in outputs]


def referred(first_of: dict[str, str], forecast: Any = None, *, loop: dict[str, Any], **fields: Any) -> GuidedReference:
    """The same loop by the reference."""
    model = hidden_only()
    blocks = [(block, ("hidden_states",)) for block in (*model.blocks, *model.more)]
    given = tiny.fields(**dict(residual_diff_threshold=0.08) | fields) | ({"forecast": forecast} if forecast else {})
    with GuidedReference(model, blocks, first_of=first_of, **given) as reference:

        def call(branch: str, prompt: Tensor, timestep: float, latents: Tensor) -> Tensor:
            times = torch.full((latents.shape[0],), timestep)
            return reference(branch, hidden_states=latents, encoder_hidden_states=prompt, timestep=times)

        for _ in Loop(call, **loop):
            pass
    return reference


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")], ids="-".join)
@pytest.mark.parametrize("named", ["session", "labels"])
def test_the_branch_that_is_called_second_follows_the_first(order: tuple[str, str], named: str):
    model = enabled(max_continuous_guidance_steps=2)
    around = in_session("one") if named == "session" else within_guidance_branch
    outputs = run(model, order=order, around=around)
    reference = referred({order[1]: order[0]}, loop=dict(order=order), max_continuous_guidance_steps=2)
    assert_bitwise(outputs, outputs_of(reference))
    for branch, stats in zip(order, every_session(model), strict=True):
        assert_same_decisions(stats, reference.of(branch))
    assert {"guidance", "guidance-continuous", "diff-below"} <= {*every_session(model)[1].decisions}


def test_a_wrong_reference_gives_other_outputs():
    """The comparisons above detect a branch that follows another request's branch."""
    model = enabled()
    outputs = run(model, around=in_session("one"))
    other = run(enabled(), seed=2, around=in_session("one"))
    assert every_session(model)[1].guided_steps
    assert not torch.equal(outputs[-1], other[-1])


# Requests.


def alone(seed: int, **fields: Any) -> tuple[list[Tensor], list[list[str]]]:
    """The outputs and the decisions of a request that runs alone."""
    model = enabled(**fields)
    return run(model, seed=seed, around=in_session("alone")), [stats.decisions for stats in every_session(model)]


def test_interleaved_requests_are_served_as_if_alone():
    expected = {seed: alone(seed) for seed in (1, 2)}
    model = enabled()
    found: dict[int, list[Tensor]] = {1: [], 2: []}
    pending: dict[int, Iterator[Tensor]] = {}

    def calls(seed: int) -> Iterator[Tensor]:
        """The outputs of a request, one call at a time."""
        prompts, latents = [tiny.prompt(10 * seed), tiny.prompt(10 * seed + 1)], tiny.latents(seed)
        for timestep in TIMES:
            outputs = []
            for prompt in prompts:
                with cachedit_fx.session(seed):
                    outputs.append(tiny.step(model, prompt, timestep, latents))
                yield outputs[-1]
            latents = latents - SPEED * (outputs[0] + outputs[-1])

    pending = {seed: calls(seed) for seed in (1, 2)}
    for _ in range(2 * len(TIMES)):  # cond of 1, cond of 2, uncond of 1, uncond of 2.
        for seed in (1, 2):
            found[seed].append(next(pending[seed]))
    for seed, (outputs, decisions) in expected.items():
        assert_bitwise(found[seed], outputs)
        assert [s.decisions for s in every_session(model) if s.session.startswith(f"{seed},")] == decisions
        assert "guidance" in decisions[1]


def test_requests_in_two_threads_are_served_as_if_alone():
    expected = {seed: alone(seed)[0] for seed in (1, 2)}
    model = enabled()
    run(model, seed=3, around=in_session("compiles"))
    found: dict[int, list[Tensor]] = {}
    step = threading.Barrier(2, timeout=60)

    def serve(seed: int) -> None:
        with torch.no_grad():
            found[seed] = []
            for outputs in Loop(called(model), seed=seed, around=within_guidance_branch):
                found[seed] += outputs
                step.wait()

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, outputs in expected.items():
        assert_bitwise(found[seed], outputs)


def decided_alone(loop: Callable[[nn.Module], Any], **fields: Any) -> nn.Module:
    """Asserts that a loop gives the same outputs and decisions as without guidance reuse. Returns the model."""
    model = enabled(**fields)
    outputs = loop(model)
    plain = enabled(**fields | {"guidance_reuse": "off"})
    assert_bitwise(outputs, loop(plain))
    assert [s.decisions for s in every_session(model)] == [s.decisions for s in every_session(plain)]
    assert not any(stats.guided_steps for stats in every_session(model))
    return model


def test_labels_of_interleaved_requests_without_names_are_not_paired(caplog: pytest.LogCaptureFixture):
    def loop(model: nn.Module) -> list[Tensor]:
        """Two requests in one thread, both with the labels of diffusers, and each with its own prompts."""
        outputs = []
        prompts = {(seed, label): tiny.prompt(10 * seed + i) for seed in (1, 2) for i, label in enumerate(("c", "u"))}
        for timestep in TIMES:
            for label in ("c", "u"):
                for seed in (1, 2):
                    set_label(label)
                    outputs.append(tiny.step(model, prompts[seed, label], timestep, tiny.latents(seed)))
        set_label(None)
        return outputs

    decided_alone(loop)
    assert "it is not known which calls are the guidance branches of one request" in caplog.text


def test_unnamed_calls_without_labels_outside_of_a_pipeline_are_not_paired(caplog: pytest.LogCaptureFixture):
    model = decided_alone(run)
    warnings = [record.message for record in caplog.records if "guidance_reuse" in record.message]
    assert len(warnings) == 1 and "name the request (cachedit_fx.session)" in warnings[0]
    assert any("it is not known which calls" in note for note in cachedit_fx.summary(model, logging=False).notes)


def test_three_branches_without_labels_are_not_paired(caplog: pytest.LogCaptureFixture):
    decided_alone(lambda model: run(model, order=("a", "b", "c"), around=in_session("one")))
    assert "more than two guidance branches need labels" in caplog.text


def test_of_three_labelled_branches_the_later_two_follow_the_first():
    model = enabled()
    outputs = run(model, order=("a", "b", "c"), around=within_guidance_branch)
    reference = referred({"b": "a", "c": "a"}, loop=dict(order=("a", "b", "c")))
    assert_bitwise(outputs, outputs_of(reference))
    a, b, c = every_session(model)
    assert b.guided_steps == c.guided_steps != [] and not a.guided_steps


def test_a_model_that_is_called_once_per_step_says_so_once(caplog: pytest.LogCaptureFixture):
    decided_alone(lambda model: run(model, order=("only",)) + run(model, order=("only",), seed=2))
    warnings = [record.message for record in caplog.records if "guidance_reuse" in record.message]
    assert len(warnings) == 1 and "the model is called once per step" in warnings[0]


def test_a_branch_at_another_timestep_is_not_followed():
    def loop(model: nn.Module) -> list[Tensor]:
        outputs = []
        prompts, latents = [tiny.prompt(1), tiny.prompt(2)], tiny.latents()
        for timestep in TIMES:
            for i, label in enumerate(("cond", "uncond")):
                with within_guidance_branch(label):
                    outputs.append(tiny.step(model, prompts[i], timestep + 0.01 * i, latents))
        return outputs

    decided_alone(loop)


def test_a_new_first_branch_is_not_compared_with_the_old_one():
    """The negative prompt stays, and another prompt takes the place of the first one in the middle of the loop."""
    model = enabled(residual_diff_threshold=0.001)
    prompts, latents = [tiny.prompt(1), tiny.prompt(2)], tiny.latents()
    for step, timestep in enumerate(TIMES):
        prompts[0] = tiny.prompt(3) if step == 4 else prompts[0]
        for prompt in prompts:
            with cachedit_fx.session("one"):
                tiny.step(model, prompt, timestep, latents)
    *_, uncond = [stats for stats in every_session(model) if stats.num_steps == len(TIMES)]
    assert 4 not in uncond.guided_steps  # The first step of the new branch.
    assert [step for step in uncond.guided_steps if step < 4] and [step for step in uncond.guided_steps if step > 4]


# Regions that cannot follow.


def test_a_region_whose_text_stream_is_used_after_it_is_decided_on_its_own(caplog: pytest.LogCaptureFixture):
    model = enabled(tiny.build())
    run(model, around=in_session("one"))
    assert not any(stats.guided_steps for stats in every_session(model))
    assert "encoder_hidden_states leaves blocks[1:4], too" in caplog.text


def test_block_pruning_is_decided_on_its_own(caplog: pytest.LogCaptureFixture):
    model = enabled(cache_type="DBPrune")
    run(model, around=in_session("one"))
    assert not any(stats.guided_steps for stats in every_session(model))
    assert "decides about every block on its own" in caplog.text


def test_branches_of_different_sizes_are_decided_on_their_own(caplog: pytest.LogCaptureFixture):
    def loop(model: nn.Module) -> list[Tensor]:
        outputs = []
        prompts, latents = [tiny.prompt(1), tiny.prompt(2)], [tiny.latents(), tiny.latents(tokens=4)]
        for timestep in TIMES:
            for i, label in enumerate(("cond", "uncond")):
                with within_guidance_branch(label):
                    outputs.append(tiny.step(model, prompts[i], timestep, latents[i]))
        return outputs

    # With a mask, both branches compute the same steps in any case.
    mask = dict(steps_computation_mask=(1, 0, 1, 0), steps_computation_policy="static")
    decided_alone(loop, **mask)
    assert "differ in shape or dtype" in caplog.text


def test_every_region_follows_on_its_own():
    model = enabled(regions="per_list", residual_diff_threshold=0.001)
    run(model, around=in_session("one"))
    sessions = every_session(model)
    assert len(sessions) == 4
    first, second = sessions[:2], sessions[2:]
    for one, other in zip(first, second, strict=True):
        computed = {*EVERY_STEP} - {*one.cached_steps} - {0}
        assert one.region == other.region and {*other.guided_steps} == computed != set()


# Limits, masks and forecasters.


def test_warm_up_steps_and_max_cached_steps_limit_guided_steps():
    model = enabled(max_warmup_steps=3, max_cached_steps=2, residual_diff_threshold=0.001)
    run(model, around=in_session("one"))
    _, uncond = every_session(model)
    assert uncond.decisions[:3] == ["warmup"] * 3
    assert uncond.guided_steps == uncond.cached_steps == [3, 4]


@pytest.mark.parametrize(
    "fields", [{"residual_diff_threshold": 0.0}, {"max_cached_steps": 0}], ids=lambda f: next(iter(f))
)
def test_nothing_is_guided_where_nothing_may_be_reused(fields: dict[str, Any]):
    model = enabled(**fields)
    outputs = run(model, around=in_session("one"))
    assert_bitwise(outputs, run(hidden_only()))
    assert not any(stats.cached_steps for stats in every_session(model))


STATIC = dict(
    steps_computation_mask=(1, 1, 0, 1, 0, 1, 0, 1),
    steps_computation_policy="static",
    guidance_computation_mask=(1, 1, 0, 0, 0, 1),
)


def running_mean(values: list[tuple[int, np.ndarray]], _now: float) -> np.ndarray:
    return functools.reduce(lambda mean, value: (mean + value) / 2, (value for _, value in values))


@pytest.mark.parametrize(
    ("forecaster", "forecast"), [(Line(), by_line), (Average(), running_mean)], ids=["line", "mean"]
)
def test_a_forecaster_takes_guided_residuals_for_computed_ones(forecaster: Forecaster, forecast: Any):
    """The second forecaster stores something other than the residuals."""
    model = enabled(forecaster=forecaster, **STATIC)
    outputs = run(model, around=in_session("one"))
    cond, uncond = every_session(model)
    assert cond.cached_steps == [2, 4, 6] and uncond.cached_steps == [2, 3, 4, 6, 7] and uncond.guided_steps == [3, 7]
    expected = by_static_masks(STATIC["steps_computation_mask"], (3, 7), forecast)
    # A forecast sums float32 values in another order.
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, i=index: f"{i}: {text}")


def by_static_masks(mask: Sequence[int], guided: Sequence[int], forecast: Any) -> list[Tensor]:
    """The loop by hand."""
    model = hidden_only()
    values: dict[str, list[tuple[int, Tensor]]] = {"cond": [], "uncond": []}
    differences: list[tuple[int, Tensor]] = []  # At the steps that both branches compute.

    def forecast_of(history: list[tuple[int, Tensor]], step: int) -> Tensor:
        return torch.from_numpy(forecast([(s, value.numpy()) for s, value in history], step))

    def call(branch: str, prompt: Tensor, timestep: float, latents: Tensor) -> Tensor:
        step, mine, of_cond = TIMES.index(timestep), values[branch], values["cond"]
        scale = torch.full((latents.shape[0], 1, 1), 1 + timestep)
        start = hidden = model.blocks[0](model.proj_in(latents), prompt, scale)
        if branch == "uncond" and step in guided:
            mine.append((step, of_cond[-1][1] + forecast_of(differences, step)))
            hidden = start + mine[-1][1]
        elif mask[step]:
            for block in model.blocks[1:]:
                hidden = block(hidden, prompt, scale)
            for block in model.more:
                hidden = block(hidden, prompt, torch.ones_like(scale))
            mine.append((step, hidden - start))
            if branch == "uncond":
                differences.append((step, mine[-1][1] - of_cond[-1][1]))
        else:
            hidden = start + forecast_of(mine, step)
        return model.proj_out(hidden)

    return [output for outputs in Loop(call) for output in outputs]


# The rest of the package.


def test_a_guided_step_is_served_without_dynamo_and_runs_no_block_of_the_region():
    model = enabled(residual_diff_threshold=0.001)
    run(model, seed=2, around=in_session("compiles"))
    with served(model) as calls:
        prompts, latents = [tiny.prompt(1), tiny.prompt(2)], tiny.latents()
        ran = []
        for timestep in TIMES:
            for prompt in prompts:
                with cachedit_fx.session("one"):
                    ran.append(tiny.ran_blocks(model, prompt, timestep, latents))
    assert all(calls)
    assert ran == [6, 6] + [6, 1] * 7


def test_shadow_mode_measures_the_error_of_a_guided_step():
    model = enabled(shadow=True, **STATIC)
    outputs = run(model, around=in_session("one"))
    assert_bitwise(outputs, run(hidden_only()))
    _, uncond = every_session(model)
    assert uncond.guided_steps == [3, 7] and all(uncond.errors[step].reused for step in (3, 7))
    # Up to the first guided step, the shadowed branches cached what the followed ones would have.
    followed = enabled(**STATIC)
    loop = dict(around=in_session("one"))
    plain = [outputs[2 * step + 1] for step in EVERY_STEP]
    reused = errors_of_first_guided_step(followed, outputs, loop)
    expected = (reused - plain[3]).norm() / plain[3].norm()
    assert uncond.errors[3].output == pytest.approx(expected.item(), rel=1e-4)


def errors_of_first_guided_step(model: nn.Module, outputs: list[Tensor], loop: dict[str, Any]) -> Tensor:
    """The output of the second branch at step 3, on the latents of the uncached model."""
    prompts, latents = [tiny.prompt(10), tiny.prompt(11)], tiny.latents(1)
    for step, timestep in enumerate(TIMES):
        for i, prompt in enumerate(prompts):
            with cachedit_fx.session("one"):
                output = tiny.step(model, prompt, timestep, latents)
            if (step, i) == (3, 1):
                return output
        latents = latents - SPEED * (outputs[2 * step] + outputs[2 * step + 1])
    raise AssertionError


def test_the_residual_of_the_first_branch_counts_as_cached_by_the_second():
    model = enabled()
    run(model, around=in_session("one"))
    cond, uncond = every_session(model)
    assert (cond.peak_state_bytes, uncond.peak_state_bytes) == (2 * tiny.STREAM_BYTES, 3 * tiny.STREAM_BYTES)
    plain = enabled(guidance_reuse="off")
    run(plain, around=in_session("one"))
    assert [stats.peak_state_bytes for stats in every_session(plain)] == [2 * tiny.STREAM_BYTES] * 2


def test_a_refresh_forgets_the_difference():
    model = enabled(force_refresh_step_hint=4, residual_diff_threshold=0.001)
    run(model, around=in_session("one"))
    assert every_session(model)[1].decisions == (["warmup"] + ["guidance"] * 3) * 2


def test_tables_show_guided_steps():
    model = enabled(residual_diff_threshold=0.001)
    run(model, around=in_session("one"))
    text = str(cachedit_fx.summary(model, details=True, logging=False))
    assert "7 (7 by guidance)" in text and "reuse (guidance)" in text


def test_explain_says_whether_a_region_may_follow_and_counts_the_bytes_of_the_differences():
    inputs = dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=torch.ones(tiny.BATCH))

    def region_of(model: nn.Module, **fields: Any) -> Any:
        explained = cachedit_fx.explain(model, cache_config=CacheConfig(**tiny.fields(**fields)), **inputs)
        return next(graph for graph in explained.graphs if graph.is_cached).regions[0]

    plain, follows = region_of(hidden_only()), region_of(hidden_only(), **GUIDED)
    text = region_of(tiny.build(), **GUIDED)
    assert (plain.guidance, plain.state_bytes) == ("", 2 * tiny.STREAM_BYTES)
    assert "the others add their difference" in follows.guidance and follows.state_bytes == 3 * tiny.STREAM_BYTES
    assert "because encoder_hidden_states leaves blocks[1:4], too" in text.guidance


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(enable_separate_cfg=False), "enable_separate_cfg must be True or None with guidance_reuse='difference'"),
        (
            dict(guidance_reuse_threshold=0.1, **STATIC),
            "guidance_reuse_threshold must be None where nothing is measured, got 0.1 with steps_computation_policy",
        ),
    ],
    ids=["one-call", "static"],
)
def test_fields_that_contradict_guidance_reuse_are_refused(fields: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        enabled(**fields)


@pytest.mark.slow
def test_a_guided_step_that_is_compiled_equals_the_eager_one():
    eager = run(enabled(), around=in_session("one"))
    model = enabled(inner_backend="inductor")
    outputs = run(model, around=in_session("one"))
    assert every_session(model)[1].guided_steps
    for output, wanted in zip(outputs, eager, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)  # Inductor fuses and reorders float32 sums.
