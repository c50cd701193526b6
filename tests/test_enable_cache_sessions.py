"""Generations of pipelines after `enable_cache`: each has the same outputs as alone.

The expected outputs are those of the plain-Python reference in a separate pipeline. The transformers are those of
`tests.models`, so that some steps after the warm-up are reused and others are not.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.runtime.instances import instances_in
from tests.generations import (
    NUM_STEPS,
    assert_bitwise,
    assert_newest_sessions,
    assert_same_decisions,
    assert_worth_comparing,
    reference_pipeline_run,
    settings,
)
from tests.models import BATCH, FLUX, QWEN_IMAGE, SIDE, WAN, Prompt, denoise, denoise_steps, noise
from tests.reference import ReferenceCache
from tests.sessions import every_session

on_shared = pytest.mark.shares_graphs("sessions-wan")


def enabled(family: Any = WAN, **fields: Any) -> DiffusionPipeline:
    pipe = family.pipeline(family.build())
    pipe.set_progress_bar_config(disable=True)
    return cachedit_fx.enable_cache(pipe, **settings(family) | fields, inner_backend="eager", fullgraph=True)


@functools.cache
def shared_transformer() -> nn.Module:
    """Wan's transformer with the cache, traced once for all tests that use `shared`."""
    return enabled().transformer


def shared() -> DiffusionPipeline:
    """A new pipeline around `shared_transformer`."""
    pipe = WAN.pipeline(shared_transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: DiffusionPipeline, prompt: Prompt, seed: int = 1, guidance: float = 2.0, **others: Any) -> Tensor:
    """The final latents of Wan's pipeline."""
    return pipe(
        num_inference_steps=NUM_STEPS,
        prompt_embeds=prompt.cond["encoder_hidden_states"],
        negative_prompt_embeds=prompt.uncond["encoder_hidden_states"],
        guidance_scale=guidance,
        latents=WAN.latents(seed),
        height=SIDE * 16,
        width=SIDE * 16,
        num_frames=5,
        output_type="latent",
        return_dict=False,
        **others,
    )[0]


@functools.cache
def alone(seed: int = 1, guidance: float = 2.0, **fields: Any) -> tuple[ReferenceCache, Tensor]:
    """The reference after such a call, and the final latents."""
    model = WAN.build()
    pipe = WAN.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    guidance_branches = itertools.cycle(("cond", "uncond") if guidance > 1 else ("cond",))
    with ReferenceCache(model, WAN.chain(model), **settings(WAN) | fields) as reference:
        model.forward = reference.stand_in_for_forward(lambda: next(guidance_branches))
        latents = call(pipe, WAN.prompt(seed), seed, guidance)
    assert_worth_comparing(reference.of("cond"))
    return reference, latents


def assert_alone(pipe: DiffusionPipeline, output: Tensor, expected: tuple[ReferenceCache, Tensor]) -> None:
    """Asserts that the output is bitwise that of the call alone and that the last sessions have the same decisions."""
    reference, latents = expected
    last = cachedit_fx.summary(pipe, logging=False)
    assert [stats.session for stats in last] == [*dict.fromkeys(record.guidance_branch for record in reference.records)]
    for stats in last:
        assert_same_decisions(stats, reference.of(stats.session))
    assert_bitwise([output], [latents])


def assert_nothing_open(pipe: DiffusionPipeline) -> None:
    """Asserts that the sessions of the call ended with it and released their state."""
    (instance,) = instances_in(pipe.transformer)
    assert not instance._sessions
    assert {stats.state_bytes for stats in every_session(pipe.transformer)} == {0}


# Sequential calls.


@pytest.mark.slow
@pytest.mark.parametrize("family", [FLUX, QWEN_IMAGE], ids=lambda family: family.name)
def test_a_generation_equals_the_reference_and_leaves_no_session_open(family):
    reference, expected = reference_pipeline_run(family, 1, **settings(family))
    pipe = enabled(family)
    assert_bitwise(family.generate(pipe, family.prompt(1), family.latents(1), NUM_STEPS), expected)
    assert_newest_sessions(pipe.transformer, family, reference)
    assert_nothing_open(pipe)
    shown = cachedit_fx.summary(pipe, logging=False)
    assert [stats.session for stats in shown] == [*family.guidance_branches]
    assert all(stats.peak_state_bytes > 0 for stats in shown)


def test_pipelines_of_one_class_with_their_own_configurations_run_as_if_alone():
    configurations = {}, {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1, "max_continuous_cached_steps": 1}
    expected = [alone(**fields) for fields in configurations]
    pipes = [enabled(**fields) for fields in configurations]
    for turn in (0, 1, 0):
        assert_alone(pipes[turn], call(pipes[turn], WAN.prompt(1)), expected[turn])


@on_shared
def test_guidance_may_be_switched_on_and_off_between_calls():
    pipe, prompt = shared(), WAN.prompt(1)
    for guidance in (2.0, 1.0, 2.0, 1.0):
        expected = alone(guidance=guidance)
        assert_alone(pipe, call(pipe, prompt, guidance=guidance), expected)
        assert_nothing_open(pipe)


class Stop(Exception):
    """Raised by a user's callback."""


def interrupt(pipe: DiffusionPipeline) -> None:
    pipe._interrupt = True


def fail(pipe: DiffusionPipeline) -> None:
    raise Stop


def cut_short(pipe: DiffusionPipeline, prompt: Prompt, at: int, how: Callable[[DiffusionPipeline], None]) -> None:
    """Runs a call that ends after step `at`."""
    steps = []

    def callback(
        pipe: DiffusionPipeline, step: int, _timestep: Tensor, _values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        steps.append(step)
        if step == at:
            how(pipe)
        return {}

    try:
        call(pipe, prompt, seed=2, callback_on_step_end=callback)
    except Stop:
        assert how is fail
    assert steps == [*range(at + 1)]


@on_shared
def test_an_interrupted_call_does_not_affect_the_next_one():
    pipe, prompt, expected = shared(), WAN.prompt(1), alone()
    for at, how in ((6, interrupt), (6, fail), (0, interrupt), (1, fail), (NUM_STEPS - 1, fail)):
        cut_short(pipe, prompt, at, how)  # With other latents and the same prompt objects.
        assert_alone(pipe, call(pipe, prompt), expected)
        assert_nothing_open(pipe)


def test_a_call_that_failed_at_its_first_step_does_not_affect_the_next_one():
    pipe, prompt, expected = enabled(), WAN.prompt(1), alone()
    cut_short(pipe, prompt, 0, fail)
    assert_alone(pipe, call(pipe, prompt), expected)


def flux_pipelines() -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """A text-to-image pipeline, and an image-to-image pipeline with the same transformer."""
    text_to_image = FLUX.pipeline(FLUX.build())
    image_to_image = FluxImg2ImgPipeline.from_pipe(text_to_image)
    # A tensor with this number of channels counts as an encoded image.
    image_to_image.latent_channels = 4
    image_to_image.image_processor.register_to_config(vae_latent_channels=4)
    for pipe in (text_to_image, image_to_image):
        pipe.set_progress_bar_config(disable=True)
    return text_to_image, image_to_image


def draw(pipes: tuple[DiffusionPipeline, DiffusionPipeline], prompt: Prompt, strength: float | None) -> Tensor:
    """The output of image-to-image with `strength`, or of text-to-image if it is None."""
    image = noise(BATCH, 4, 2 * SIDE, 2 * SIDE, seed=1)
    start = (
        dict(latents=FLUX.latents(1))
        if strength is None
        else dict(image=image, strength=strength, generator=torch.Generator().manual_seed(1))
    )
    return pipes[strength is not None](
        num_inference_steps=NUM_STEPS,
        prompt_embeds=prompt.cond["encoder_hidden_states"],
        pooled_prompt_embeds=prompt.cond["pooled_projections"],
        height=SIDE * 16,
        width=SIDE * 16,
        output_type="latent",
        return_dict=False,
        **start,
    )[0]


def test_text_to_image_and_image_to_image_share_a_transformer_and_run_as_if_alone():
    fields, expected = settings(FLUX), {}
    for strength in (None, 0.8, 0.5):
        pipes = flux_pipelines()
        model = pipes[0].transformer
        with ReferenceCache(model, FLUX.chain(model), **fields) as reference:
            model.forward = reference.stand_in_for_forward(lambda: "only")
            expected[strength] = draw(pipes, FLUX.prompt(1), strength), reference.of("only")
        assert_worth_comparing(reference.of("only"))

    pipes, prompt = flux_pipelines(), FLUX.prompt(1)
    cachedit_fx.enable_cache(pipes[0], **fields, inner_backend="eager", fullgraph=True)
    for strength in (None, 0.8, 0.5, None, 0.5):
        latents, records = expected[strength]
        assert_bitwise([draw(pipes, prompt, strength)], [latents])
        (last,) = cachedit_fx.summary(pipes[strength is not None], logging=False)
        assert_same_decisions(last, records)
        assert_nothing_open(pipes[0])


# Concurrent calls.


@on_shared
def test_pipelines_in_two_threads_with_one_transformer_run_as_if_alone():
    expected = {seed: alone(seed) for seed in (1, 2)}
    pipe = shared()
    call(pipe, WAN.prompt(3), 3)  # Compiles before the threads start.
    cachedit_fx.reset()
    turns = threading.Barrier(2, timeout=60)  # The steps of the threads alternate.

    def generate(seed: int) -> Tensor:
        torch.set_num_threads(1)  # Dynamo guards on it; a new thread has a separate setting.
        own_pipe = type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        own_pipe.set_progress_bar_config(disable=True)
        assert own_pipe.transformer is pipe.transformer

        def wait(*_: object) -> dict[str, Tensor]:
            turns.wait()
            return {}

        try:
            return call(own_pipe, WAN.prompt(seed), seed, callback_on_step_end=wait)
        except BaseException:
            turns.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        outputs = dict(zip((1, 2), pool.map(generate, (1, 2)), strict=True))
    assert_nothing_open(pipe)
    found = every_session(pipe.transformer)
    assert sorted(stats.session for stats in found) == ["cond", "cond", "uncond", "uncond"]
    for seed, (reference, latents) in expected.items():
        assert_bitwise([outputs[seed]], [latents])
        for guidance_branch in WAN.guidance_branches:
            reasons = [record.reason for record in reference.of(guidance_branch)]
            assert reasons in [stats.decisions for stats in found if stats.session == guidance_branch]


def test_interleaved_requests_of_one_thread_are_distinguished_by_their_names():
    """As in a server: the prompts are one object, so that only the name distinguishes requests."""
    family, prompt = WAN, WAN.prompt(1)
    model = family.build()
    cachedit_fx.enable_cache(model, **settings(family), inner_backend="eager", fullgraph=True)
    expected = []
    for seed in (1, 2):
        plain = family.build()
        with ReferenceCache(plain, family.chain(plain), **settings(family)) as reference:
            denoise(reference, family, prompt, family.latents(seed), NUM_STEPS)
        expected.append([record.output for record in reference.records])

    outputs: list[list[Tensor]] = [[], []]

    def request(number: int) -> Callable[..., Tensor]:
        def run(guidance_branch: str, **inputs: Any) -> Tensor:
            with cachedit_fx.session(number), model.cache_context(guidance_branch):
                outputs[number].append(model(**inputs)[0])
            return outputs[number][-1]

        return run

    with torch.no_grad():
        running = [
            denoise_steps(request(number), family, prompt, family.latents(number + 1), NUM_STEPS) for number in (0, 1)
        ]
        for _both in zip(*running, strict=True):
            pass
    for found, wanted in zip(outputs, expected, strict=True):
        assert_bitwise(found, wanted)
    names = {stats.session for stats in every_session(model)}
    assert names == {f"{number}, {guidance_branch}" for number in (0, 1) for guidance_branch in ("cond", "uncond")}
