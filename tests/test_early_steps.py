"""The warm-up of the default configuration, which ends once the scheduler's timestep has changed by a sixth."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.policies import History, Progress, decide
from cachedit_fx.policies.decide import num_warmup_steps
from cachedit_fx.policies.guided_steps import num_guidance_warmup_steps
from cachedit_fx.policies.position import num_early_steps
from cachedit_fx.runtime import scheduler_run
from cachedit_fx.runtime.scheduler_run import SchedulerRun
from tests import tiny
from tests.tiny_pipelines import PIPELINES

REUSES = dict(residual_diff_threshold=1.0, forecaster=None, inner_backend="eager")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def flow(num_steps: int, shift: float = 1.0) -> list[float]:
    """The timesteps of a flow-matching scheduler, from 1000."""
    even = [1 - i / num_steps for i in range(num_steps)]
    return [1000 * shift * t / (1 + (shift - 1) * t) for t in even]


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        (flow(28), 5),
        (flow(20, shift=3), 8),
        (flow(50, shift=4), 23),
        (flow(4), 1),
        (flow(4, shift=3), 2),
        ([t / 1000 for t in flow(28)], 5),  # In any unit.
        ([1 - t / 1000 for t in flow(28)], 5),  # Timesteps that rise have the same range.
        ([t for t in flow(14) for _ in range(2)], 6),  # Heun calls the model twice at each.
        ([7.0], 1),
    ],
)
def test_early_steps_change_the_timestep_by_less_than_a_sixth_of_its_range(timesteps, expected):
    assert num_early_steps(timesteps) == expected


def test_early_steps_are_counted_from_the_first_step_of_the_session():
    assert num_early_steps(flow(28), 14) == 3  # From 500, as for an image that is changed.


@pytest.mark.parametrize(
    ("timesteps", "start"), [([], 0), ([0.0, 0.0], 0), ([math.nan, 500.0], 0), (flow(4), 4), (flow(4), -1)]
)
def test_timesteps_that_say_nothing_have_no_early_steps(timesteps, start):
    assert num_early_steps(timesteps, start) is None


@pytest.mark.parametrize(
    ("given", "num_early", "expected"),
    [(None, None, 8), (None, 5, 5), (None, 25, 8), (8, 5, 8), (12, 5, 12), (0, 5, 0)],
)
def test_a_number_is_used_as_it_is_and_the_default_has_at_most_eight_steps(given, num_early, expected):
    config, progress = CacheConfig(max_warmup_steps=given), Progress(0, 28, num_early)
    assert num_warmup_steps(config, progress) == num_guidance_warmup_steps(config, progress) == expected
    at = [
        decide(config, History(num_steps=i, has_moved=True), 0.0, is_cached=True, progress=progress).reason
        for i in range(14)
    ]
    assert at == ["warmup"] * expected + ["diff-below"] * (14 - expected)


def test_a_mask_that_begins_with_fewer_ones_shortens_the_warm_up():
    config = CacheConfig(steps_computation_mask=(1, 1, 0, 1), guidance_computation_mask=(1, 0))
    progress = Progress(0, 28, 5)
    assert num_warmup_steps(config, progress) == 2
    assert num_guidance_warmup_steps(config, progress) == 1


def warmups(module: object) -> list[int]:
    return [entry.decisions.count("warmup") for entry in cachedit_fx.summary(module, logging=False)]


@pytest.mark.parametrize(
    ("name", "num_steps", "expected"),
    [
        ("flux", 12, [2]),
        ("flux", 3, [1]),
        ("wan", 12, [5, 5]),  # Its schedule is shifted by 3.
        ("flux_img2img", 12, [2]),  # Of its last 7 steps.
    ],
)
def test_a_pipelines_scheduler_shortens_the_warm_up(name, num_steps, expected):
    entry = PIPELINES[name]
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, **REUSES)
    for _ in range(2):
        entry.run(pipe, num_steps=num_steps)
        assert warmups(pipe) == expected
        assert all(found.cached_steps for found in cachedit_fx.summary(pipe, logging=False))


def test_the_warm_up_of_a_second_transformer_begins_with_its_first_step():
    entry = PIPELINES["wan22"]
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, **REUSES)
    entry.run(pipe, num_steps=12)
    for name in entry.transformers:
        for found in cachedit_fx.summary(getattr(pipe, name), logging=False):
            assert 1 <= found.decisions.count("warmup") < found.num_steps


def test_outside_of_a_pipeline_eight_steps_are_computed():
    model = tiny.build()
    cached = tiny.compiled(model, max_warmup_steps=None, residual_diff_threshold=1.0)
    times = [1000.0 - 60 * i for i in range(12)]
    tiny.generate(cached, tiny.prompt(), tiny.latents(), times)
    assert warmups(model) == [8]


def test_timesteps_are_read_once_per_run_and_only_for_the_default():
    timesteps = torch.tensor(flow(28))
    runs = [SchedulerRun(weakref.ref(timesteps), step, 0, 28) for step in range(4)]
    for step, run in enumerate(runs):
        assert run.progress(History(num_steps=step), reads_timesteps=False) == Progress(step, 28)
    assert timesteps not in scheduler_run._values_of
    found = []
    for step, run in enumerate(runs):
        assert run.progress(History(num_steps=step), reads_timesteps=True) == Progress(step, 28, 5)
        found.append(scheduler_run._values_of[timesteps])
    assert all(values is found[0] for values in found)
