"""`start_percent`, `end_percent` and `final_compute_steps`, whose length of a generation is that of the scheduler."""

from __future__ import annotations

import pytest
import torch

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.config.cache_config import check_together
from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.why_idle import why_none_reused
from cachedit_fx.policies import History, Progress, StepView, decide
from tests import tiny
from tests.tiny_pipelines import PIPELINES

ALWAYS = dict(residual_diff_threshold=1.0, max_warmup_steps=0, forecaster=None, inner_backend="eager")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def decided(length: int | None, num_steps: int = 10, **fields) -> str:
    """The decisions of a generation in which nothing else asks for a computed step: "." computed, "C" reused."""
    config = CacheConfig(**{**ALWAYS, **fields})
    history = History(has_moved=True)
    found = ""
    for i in range(num_steps):
        decision = decide(config, history, 0.0, is_cached=True, progress=Progress(i, length))
        found += "." if decision.compute else "C"
        history = history.after(decision)
    return found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(), "CCCCCCCCCC"),
        (dict(start_percent=0.25), "...CCCCCCC"),
        (dict(start_percent=0.3), "...CCCCCCC"),
        (dict(end_percent=0.8), "CCCCCCCC.."),
        (dict(end_percent=0.75), "CCCCCCCC.."),
        (dict(final_compute_steps=1), "CCCCCCCCC."),
        (dict(final_compute_steps=10), ".........."),
        (dict(start_percent=0.2, end_percent=0.9, final_compute_steps=3), "..CCCCC..."),
        (dict(start_percent=0.2, steps_computation_mask=[0] * 10, steps_computation_policy="static"), "..CCCCCCCC"),
    ],
)
def test_the_ends_of_a_generation_are_computed(fields, expected):
    assert decided(10, **fields) == expected


def test_without_a_length_nothing_is_reused_and_the_reason_says_so():
    assert decided(None, final_compute_steps=1) == ".........."
    found = decide(CacheConfig(**ALWAYS, end_percent=0.5), History(num_steps=3, has_moved=True), 0.0, is_cached=True)
    assert found.reason == "length-unknown"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(start_percent=0.5, end_percent=0.5), "start_percent must be below end_percent, which is 0.5, got 0.5"),
        (dict(start_percent=1.0), "start_percent must be below end_percent, which is 1, got 1"),
    ],
)
def test_the_part_between_the_two_must_not_be_empty(fields, told):
    with pytest.raises(ConfigError, match=told):
        check_together(CacheConfig(**fields))


def test_a_percentage_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"end_percent must be a number >= 0 and <= 1, got 90\."):
        CacheConfig(end_percent=90)


def reused(module) -> list[list[int]]:
    return [entry.cached_steps for entry in cachedit_fx.summary(module, logging=False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", [[2, 3, 4, 5]]),  # Of 8 steps, the first two and the last two are computed.
        ("wan", [[2, 3, 4, 5], [2, 3, 4, 5]]),
        ("flux_img2img", [[1, 2]]),  # Its schedule has 8 timesteps, of which it makes the last 5.
    ],
)
def test_a_pipelines_scheduler_gives_the_length(name, expected):
    entry = PIPELINES[name]
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, **ALWAYS, start_percent=0.2, final_compute_steps=2)
    entry.run(pipe, num_steps=8)
    assert reused(pipe) == expected


def test_the_second_transformer_of_a_pipeline_knows_its_place_in_the_generation():
    entry = PIPELINES["wan22"]
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, **ALWAYS, final_compute_steps=2)
    entry.run(pipe, num_steps=8)
    first, second = (cachedit_fx.summary(getattr(pipe, name), logging=False) for name in entry.transformers)
    assert sum(entry.num_steps for entry in (*first, *second)) == 16
    assert all(entry.cached_steps == list(range(1, entry.num_steps)) for entry in first)  # It makes no last step.
    assert all(entry.cached_steps == list(range(1, entry.num_steps - 2)) for entry in second)


def test_outside_of_a_pipeline_the_configuration_gives_the_length():
    model, limits = tiny.build(), dict(max_warmup_steps=0, residual_diff_threshold=1.0, final_compute_steps=2)
    cached = tiny.compiled(model, **limits, num_inference_steps=len(tiny.TIMES))
    tiny.generate(cached, tiny.prompt(), tiny.latents())
    assert reused(model) == [list(range(1, len(tiny.TIMES) - 2))]


def test_a_generation_of_unknown_length_says_why_nothing_is_reused():
    model = tiny.build()
    cached = tiny.compiled(model, max_warmup_steps=0, residual_diff_threshold=1.0, final_compute_steps=2)
    tiny.generate(cached, tiny.prompt(), tiny.latents())
    assert reused(model) == [[]]
    why = why_none_reused("", cachedit_fx.summary(model, logging=False))
    assert "the number of steps of the generation is not known outside of a pipeline" in why


class Watches:
    """A decider that records the lengths that it is shown."""

    def __init__(self) -> None:
        self.lengths: set[int | None] = set()

    def decide(self, step: StepView) -> None:
        self.lengths.add(step.num_inference_steps)


def test_a_decider_is_shown_the_length():
    entry, watches = PIPELINES["flux"], Watches()
    pipe = entry.build()
    cachedit_fx.enable_cache(pipe, **ALWAYS, decider=watches)
    entry.run(pipe, num_steps=8)
    assert watches.lengths == {8}
