"""Session identity in real pipelines: a generation is one run of the pipeline's scheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import cachedit_fx
from cachedit_fx.inspect import CacheStats
from tests.sessions import every_session
from tests.tiny_pipelines import PIPELINES, TinyPipeline

MASK = (1, 1, 0, 1, 0, 0, 1, 0)
STATIC = dict(Fn_compute_blocks=1, steps_computation_mask=MASK, steps_computation_policy="static", max_warmup_steps=8)
STATIC |= dict(forecaster=None)
REUSED = [step for step, computes in enumerate(MASK) if not computes]

pytestmark = pytest.mark.shares_graphs("whose-step-pipelines")


def enabled(tiny: TinyPipeline, **fields: Any) -> DiffusionPipeline:
    return cachedit_fx.enable_cache(tiny.build(), **(STATIC | fields), inner_backend="eager")


def compiled(tiny: TinyPipeline) -> DiffusionPipeline:
    pipe = tiny.build()
    pipe.transformer.compile(backend=cachedit_fx.Backend(cachedit_fx.CacheConfig(**STATIC, inner_backend="eager")))
    return pipe


def last(pipe: DiffusionPipeline) -> list[CacheStats]:
    return cachedit_fx.summary(pipe, logging=False)


@pytest.mark.parametrize("cached", [enabled, compiled])
def test_a_call_after_a_failed_one_starts_a_new_session(cached: Any):
    """The prompt object is the same and the timestep lower, as in the next step of the failed generation."""
    flux = PIPELINES["flux"]
    given = {name: value for name, value in flux.arguments(1).items() if name.endswith("prompt_embeds")}
    sigmas = np.linspace(0.4, 0.05, 8)

    def fail(_pipe: Any, step: int, _time: Any, found: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return found

    pipe = cached(flux)
    alone = flux.run(pipe, 2, 8, **given, sigmas=sigmas)
    with pytest.raises(KeyboardInterrupt):
        flux.run(pipe, 1, 8, **given, callback_on_step_end=fail)
    torch.testing.assert_close(flux.run(pipe, 2, 8, **given, sigmas=sigmas), alone, rtol=0, atol=0)
    assert [stats.num_steps for stats in every_session(pipe.transformer)] == [8, 4, 8]
    assert last(pipe)[0].began in ("new", "new-schedule") and last(pipe)[0].cached_steps == REUSED


def test_timesteps_that_repeat_in_low_precision_are_steps_of_one_generation():
    flux = PIPELINES["flux"]
    pipe = enabled(flux)
    pipe.transformer.to(torch.bfloat16)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=200.0)

    def halved(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

    pipe(num_inference_steps=8, **{name: halved(value) for name, value in flux.arguments(1).items()})
    [stats] = last(pipe)
    assert stats.timesteps[0] == stats.timesteps[1]  # The precondition of this test.
    assert (stats.num_steps, stats.cached_steps) == (8, REUSED)


def test_a_solver_with_two_calls_per_timestep_continues_its_session():
    wan = PIPELINES["wan"]
    pipe = enabled(wan, num_inference_steps=4)  # Heun's method makes seven calls of four steps.
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    wan.run(pipe, 1, 4)
    for stats in last(pipe):
        assert (stats.num_steps, stats.cached_steps) == (7, [step for step in REUSED if step < 7])
        assert len({*stats.timesteps}) == 4


def test_a_second_pipeline_of_the_same_transformer_has_its_own_generations():
    wan = PIPELINES["wan"]
    one, other = enabled(wan), wan.build()
    other.transformer = one.transformer
    alone = [wan.run(pipe, seed, 8) for pipe, seed in ((one, 1), (other, 2))]
    found: list[Tensor] = []

    def nested(_pipe: Any, step: int, _time: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:  # The other pipeline runs in the middle of this one's loop.
            found.append(wan.run(other, 2, 8))
        return callback_kwargs

    torch.testing.assert_close(wan.run(other, 2, 8), alone[1], rtol=0, atol=0)
    torch.testing.assert_close(wan.run(one, 1, 8, callback_on_step_end=nested), alone[0], rtol=0, atol=0)
    torch.testing.assert_close(found[0], alone[1], rtol=0, atol=0)
