"""How many tensors the host reads in a call, and when. On a GPU, a read waits for the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.forecasters import DMDCalibratorConfig, FoCaCalibratorConfig
from cachedit_fx.inspect import CacheStats
from cachedit_fx.policies import Budget, History, Magnitude, Threshold, computes_anyway, decide, decide_unread
from cachedit_fx.runtime.host_read import known
from cachedit_fx.runtime.model_call import ModelCall
from tests import tiny
from tests.host_reads import copied_reads, counted_reads
from tests.tiny_pipelines import PIPELINES

NUM_STEPS = len(tiny.TIMES)
MASK = (1, 1, 0, 1, 0, 0, 1, 0)
STATIC: dict[str, Any] = dict(steps_computation_mask=MASK, steps_computation_policy="static")
TUNED: dict[str, Any] = dict(STATIC, Fn_compute_blocks=0, probe="none", reach="output", max_warmup_steps=0)
FOCA = FoCaCalibratorConfig()

pytestmark = pytest.mark.shares_graphs("host-reads")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Pipeline:
    """A denoising loop whose scheduler counts its steps, as a pipeline of diffusers."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def __call__(self, *prompts: Tensor) -> list[Tensor]:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(tiny.TIMES), _step_index=None)
        latents, outputs = tiny.latents(), []
        for index, time in enumerate(tiny.TIMES):
            outputs += [tiny.step(self.transformer, prompt, time, latents) for prompt in prompts]
            self.scheduler._step_index = index + 1
        return outputs


def loop(transformer: nn.Module) -> Callable[..., list[Tensor]]:
    """A loop without a pipeline."""
    return lambda *prompts: [
        tiny.step(transformer, prompt, time, tiny.latents()) for time in tiny.TIMES for prompt in prompts
    ]


def enabled(**fields: Any) -> nn.Module:
    given = dict(max_warmup_steps=3, residual_diff_threshold=0.3, forecaster=None, inner_backend="eager")
    return cachedit_fx.enable_cache(tiny.build(), **(given | fields))


def reads(calls: list[list[str]]) -> str:
    """One letter per read ("d" for "decision"), one word per call, "-" for a call without any."""
    return " ".join("".join(read[0] for read in call) or "-" for call in calls)


def reads_of(runner: Callable[[nn.Module], Any], *prompts: Tensor, **fields: Any) -> str:
    """The reads of each call of a generation, in a process that has run another one."""
    module = enabled(**fields)
    run = runner(module)
    run(*(tiny.prompt(9 + i) for i in range(len(prompts) or 1)))
    with counted_reads() as calls:
        run(*(prompts or (tiny.prompt(1),)))
    return reads(calls)


def last(module: nn.Module) -> list[CacheStats]:
    return cachedit_fx.summary(module, logging=False)


IN_A_PIPELINE = {
    "a mask": (STATIC, "- - - - - - - -"),
    "a mask with a forecaster": (dict(STATIC, forecaster=FOCA), "- - - - - - - -"),
    "a tuned schedule": (dict(TUNED, forecaster=FOCA), "- - - - - - - -"),
    "a mask that may compute more": (dict(steps_computation_mask=MASK), "- - d - d d - d"),
    "a threshold": ({}, "- - - d d d d d"),
    "a threshold with a forecaster": (dict(forecaster=FOCA), "l l l d d d d d"),
    "a threshold that reuses always": (dict(residual_diff_threshold=1.0), "- - - - - - - -"),
    "a threshold of zero": (dict(residual_diff_threshold=0.0), "- - - - - - - -"),
    "a limit on consecutive steps": (dict(max_continuous_cached_steps=1), "- - - d - d - d"),
    "a budget": (dict(policy=Budget()), "- - - d d d d d"),
    "magnitudes": (dict(policy=Magnitude(ratios=(1.0,) * 8)), "- - - - - - - -"),
    "a region per block": (dict(cache_type="DBPrune"), "- - - ddd ddd ddd ddd ddd"),
}


@pytest.mark.parametrize(("fields", "expected"), IN_A_PIPELINE.values(), ids=IN_A_PIPELINE)
def test_a_call_of_a_pipeline_reads_what_its_decision_depends_on(fields: dict[str, Any], expected: str):
    assert reads_of(Pipeline, **fields) == expected


IN_A_LOOP = {
    "a mask": (STATIC, "d d d d d d d d"),
    "a threshold": ({}, "l l l d d d d d"),
    "a threshold with a forecaster": (dict(forecaster=FOCA), "l l l d d d d d"),
    "magnitudes": (dict(policy=Magnitude(ratios=(1.0,) * 8)), "d d d d d d d d"),
}


@pytest.mark.parametrize(("fields", "expected"), IN_A_LOOP.values(), ids=IN_A_LOOP)
def test_a_call_of_a_loop_reads_the_timestep_once(fields: dict[str, Any], expected: str):
    assert reads_of(loop, **fields) == expected


class NoAnswer:
    def decide(self, step: Any) -> bool | None:
        return None


def test_a_decider_is_shown_the_timestep_and_the_residual_diff():
    assert reads_of(Pipeline, decider=NoAnswer()) == " ".join("d" * NUM_STEPS)


def test_a_second_prompt_of_the_same_shape_is_compared_with_the_first():
    assert reads_of(Pipeline, tiny.prompt(1), tiny.prompt(2), **STATIC).split() == ["-", "ee"] + ["-"] * 14


def test_shadow_mode_reads_only_the_errors():
    assert {*reads_of(Pipeline, shadow=True, **STATIC).replace(" ", "")} == {"-", "s"}


def test_dmd_reads_its_inner_products_once_per_computed_step_and_stream():
    found = reads_of(Pipeline, forecaster=DMDCalibratorConfig(dmd_history=4), max_warmup_steps=5)
    # Two streams are forecast from four values on: when the fifth is computed (judged), and when the sixth is reused.
    assert found == "l l l l lll dll d d"


def test_a_real_pipeline_reads_nothing_with_a_mask():
    flux = PIPELINES["flux"]
    pipe = cachedit_fx.enable_cache(flux.build(), **STATIC, forecaster=FOCA, inner_backend="eager")
    with counted_reads() as calls:
        flux.run(pipe, 1, NUM_STEPS)
    [stats] = last(pipe)
    assert reads(calls) == "- - - - - - - -" and stats.cached_steps == [2, 4, 5, 7]
    assert len({*stats.timesteps}) == NUM_STEPS  # They are read now.


def test_the_timestep_of_a_graph_after_a_graph_break_is_read_when_it_is_needed():
    with copied_reads() as log:
        call = ModelCall(torch.tensor([3, 7]), None)
        unread = call.unread_timestep
        assert log == [("start", 0)]
        assert known(unread) == 7.0 and isinstance(known(unread), float) and len(log) == 2
        assert call.timestep == 7.0 and ModelCall(torch.empty(0), None).timestep is None


COPIED = [{}, dict(forecaster=FOCA), dict(forecaster=DMDCalibratorConfig(dmd_history=4), max_warmup_steps=5), STATIC]


@pytest.mark.parametrize("runner", [Pipeline, loop])
@pytest.mark.parametrize("fields", COPIED)
def test_reads_that_are_copies_change_nothing(runner: Callable[[nn.Module], Any], fields: dict[str, Any]):
    found = []
    for copied in (False, True):
        module = enabled(**fields)
        if copied:
            with copied_reads():
                outputs = runner(module)(tiny.prompt())
        else:
            outputs = runner(module)(tiny.prompt())
        [stats] = last(module)
        found.append((outputs, stats.decisions, stats.timesteps, stats.residual_diffs))
    tiny.assert_bitwise(found[1][0], found[0][0])
    assert found[0][1:] == found[1][1:] and {*found[0][1]} > {"warmup"}


@pytest.mark.parametrize("is_dispatched", [False, True])
def test_a_step_that_computes_in_any_case_waits_after_its_blocks_are_queued(is_dispatched: bool):
    module, prompt = enabled(forecaster=FOCA, fast_dispatch=is_dispatched), tiny.prompt(1)
    with copied_reads(lambda: tiny.Watch.ran) as log:
        for time in tiny.TIMES:
            log.append(time)
            tiny.ran_blocks(module, prompt, time, tiny.latents())
    steps = {time: log[log.index(time) + 1 :][:2] for time in tiny.TIMES}
    assert steps.pop(1.0) == [("start", 0), ("start", 1)]  # The content of the prompt, and the probe vector.
    assert [*steps.values()] == [[("start", 1), ("wait", tiny.NUM_BLOCKS)]] * 2 + [[("start", 1), ("wait", 1)]] * 5


def test_with_a_mask_no_event_is_waited_for_before_the_statistics_are_read():
    module, prompt = enabled(forecaster=FOCA, **STATIC), tiny.prompt(1)
    with copied_reads() as log:
        Pipeline(module)(prompt)
        assert [what for what, _ in log] == ["start"] * (1 + NUM_STEPS)
        assert last(module)[0].timesteps == pytest.approx(tiny.TIMES)
        assert [what for what, _ in log[1 + NUM_STEPS :]] == ["wait"] * NUM_STEPS


RULES = (Threshold(0.1), Threshold(1.0), Budget(0.1), Magnitude(ratios=(1.0, 1.5, 1.0)))
LIMITS: tuple[dict[str, Any], ...] = (
    {},
    STATIC,
    dict(steps_computation_mask=MASK),
    dict(max_warmup_steps=0, max_cached_steps=1),
    dict(max_warmup_steps=0, max_accumulated_residual_diff_threshold=0.2),
)
DIFFS = (math.nan, 0.0, 0.05, 0.5, 2.0, math.inf)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_decision_without_the_residual_diff_is_the_one_with_any(rule: Any):
    for limits, is_cached, moved, steps, cached in itertools.product(
        LIMITS, (False, True), (False, True), range(4), (0, 1)
    ):
        config = CacheConfig(policy=rule, **limits)
        history = History(steps, cached, cached, 0.3 * cached, moved)
        unread = decide_unread(config, history, is_cached=is_cached)
        found = [decide(config, history, diff, is_cached=is_cached) for diff in DIFFS]
        assert {*found} == {unread} if unread is not None else all(decision.probed for decision in found)
        if computes_anyway(config, history, is_cached=is_cached):
            in_other_sessions = itertools.product((history, History(steps, cached, cached, 0.0, True)), (False, True))
            assert all(decide(config, other, math.nan, is_cached=known).compute for other, known in in_other_sessions)
