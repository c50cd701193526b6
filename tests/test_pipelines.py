"""Whole generations with the cache are compared with the plain-Python reference.

FLUX has two block lists and one call per step; QwenImage makes two calls with two text lengths; Wan makes two
calls with one text length. Each runs in a plain loop, in the real pipeline, and interleaved with another generation.

With the inner backend "eager" the pieces run the operations of the model in their original order, and a
reused step adds the stored residual as the reference does. Therefore everything is compared bitwise.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.generations import (
    LIMITS,
    NUM_STEPS,
    WARMUP_STEPS,
    Recorder,
    assert_bitwise,
    assert_newest_sessions,
    assert_same_decisions,
    assert_worth_comparing,
    backend,
    compiled,
    compiled_for_pipelines,
    every_family,
    limited,
    on_every_family,
    outputs_of,
    reference_pipeline_run,
    reference_run,
    settings,
    trace,
)
from tests.models import FLUX, QWEN_IMAGE, WAN, Family, denoise, denoise_steps
from tests.reference import ReferenceCache
from tests.sessions import every_session


@pytest.fixture(autouse=True)
def no_grad():
    """Pipelines run without gradients; calls that need gradients are not cached."""
    with torch.no_grad():
        yield


# The reference itself.


@every_family
def test_a_reference_that_never_reuses_equals_the_plain_model(family):
    model = family.build()
    plain = Recorder(model)
    denoise(plain, family, family.prompt(1), family.latents(1), NUM_STEPS)
    with ReferenceCache(model, family.chain(model), **settings(family) | {"residual_diff_threshold": 0.0}) as reference:
        denoise(reference, family, family.prompt(1), family.latents(1), NUM_STEPS)
    assert not any(record.reused for record in reference.records)
    assert_bitwise(outputs_of(reference), plain.outputs)


@every_family
def test_the_reference_without_warmup_equals_first_block_cache_of_diffusers(family):
    model = family.build()
    with ReferenceCache(model, family.chain(model), **settings(family) | {"max_warmup_steps": 0}) as reference:
        denoise(reference, family, family.prompt(1), family.latents(1), NUM_STEPS)
    assert 0 < sum(record.reused for record in reference.records) < len(reference.records)

    model.enable_cache(FirstBlockCacheConfig(threshold=family.threshold))
    outputs = []

    def call(guidance_branch, **inputs):
        with model.cache_context(guidance_branch):
            outputs.append(model(**inputs)[0])
        return outputs[-1]

    denoise(call, family, family.prompt(1), family.latents(1), NUM_STEPS)
    assert_bitwise(outputs_of(reference), outputs)


# The plain loop.


@pytest.mark.parametrize(("Fn", "Bn"), [(1, 0), (2, 1)], ids=["F1B0", "F2B1"])
@on_every_family
def test_a_generation_matches_the_reference_bitwise(family, Fn, Bn):
    fields = settings(family, Fn, Bn)
    reference = reference_run(family, seed=1, **fields)
    module = compiled(family, fields)
    recorder = Recorder(module)
    denoise(recorder, family, family.prompt(1), family.latents(1), NUM_STEPS)
    assert_newest_sessions(module, family, reference)
    assert_bitwise(recorder.outputs, outputs_of(reference))


@pytest.mark.shares_graphs("pipelines-wan")
@pytest.mark.parametrize("reason", LIMITS)
def test_limits_match_the_reference(reason):
    fields = limited(LIMITS[reason])
    reference = reference_run(WAN, seed=1, **fields)
    assert any(record.reason == reason for record in reference.records)
    module = compiled(WAN, fields)
    recorder = Recorder(module)
    denoise(recorder, WAN, WAN.prompt(1), WAN.latents(1), NUM_STEPS)
    assert_newest_sessions(module, WAN, reference)
    assert_bitwise(recorder.outputs, outputs_of(reference))


@on_every_family
def test_a_second_generation_from_the_same_prompt_objects_starts_a_new_session(family):
    fields = settings(family)
    model = family.build()
    module = compiled(family, fields)
    prompt = family.prompt(1)
    for seed in (1, 2):
        with ReferenceCache(model, family.chain(model), **fields) as reference:
            denoise(reference, family, prompt, family.latents(seed), NUM_STEPS)
        for guidance_branch in family.guidance_branches:
            assert_worth_comparing(reference.of(guidance_branch))
        recorder = Recorder(module)
        denoise(recorder, family, prompt, family.latents(seed), NUM_STEPS)
        assert_newest_sessions(module, family, reference)
        assert_bitwise(recorder.outputs, outputs_of(reference))


# The real pipeline.


def compile_by_name(pipe, fields):
    options = fields | {"inner_backend": "eager"}
    pipe.transformer = torch.compile(pipe.transformer, backend="cachedit", fullgraph=True, options=options)


def compile_with_object(pipe, fields):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend(**fields), fullgraph=True)


def compiled_in_place(pipe, fields):
    pipe.transformer = compiled_for_pipelines(QWEN_IMAGE)


@pytest.mark.parametrize(
    ("family", "compile_transformer"),
    [
        pytest.param(FLUX, compile_by_name, id="flux-by-name"),
        pytest.param(
            QWEN_IMAGE,
            compiled_in_place,
            id="qwen_image-in-place",
            marks=pytest.mark.shares_graphs("pipelines-qwen_image"),
        ),
        pytest.param(WAN, compile_with_object, id="wan"),
    ],
)
def test_every_generation_of_a_pipeline_matches_a_new_one_bitwise(family, compile_transformer):
    fields = settings(family)
    fresh = {seed: reference_pipeline_run(family, seed, **fields) for seed in (1, 2)}
    pipe = family.pipeline(family.build())
    compile_transformer(pipe, fields)
    for seed in (1, 2, 1):  # No reset between the generations; each has new prompt tensors.
        latents = family.generate(pipe, family.prompt(seed), family.latents(seed), NUM_STEPS)
        reference, expected = fresh[seed]
        assert_newest_sessions(pipe.transformer, family, reference)
        assert_bitwise(latents, expected)


# Two generations at once.


def assert_both_sessions_found(module: nn.Module, family: Family, references: list[ReferenceCache]) -> None:
    """Asserts that every branch of every generation has a session; their order does not matter."""

    def by_diffs(diffs):
        return [diff for diff in diffs if diff is not None]

    records = [
        reference.of(guidance_branch) for reference in references for guidance_branch in family.guidance_branches
    ]
    found = [stats for stats in every_session(module) if stats.num_steps == NUM_STEPS]
    assert len(found) == len(records)
    records.sort(key=lambda guidance_branch: by_diffs(record.diff for record in guidance_branch))
    found.sort(key=lambda stats: list(stats.residual_diffs.values()))
    for stats, expected in zip(found, records, strict=True):
        assert_same_decisions(stats, expected)


@on_every_family
def test_interleaved_generations_in_one_thread_do_not_affect_each_other(family):
    fields = settings(family)
    references = [reference_run(family, seed, **fields) for seed in (1, 2)]
    module = compiled(family, fields)
    recorders = [Recorder(module), Recorder(module)]
    running = [
        denoise_steps(recorder, family, family.prompt(seed), family.latents(seed), NUM_STEPS)
        for recorder, seed in zip(recorders, (1, 2), strict=True)
    ]
    for _both in zip(*running, strict=True):
        pass
    assert_both_sessions_found(module, family, references)
    for recorder, reference in zip(recorders, references, strict=True):
        assert_bitwise(recorder.outputs, outputs_of(reference))


@on_every_family
def test_generations_in_two_threads_do_not_affect_each_other(family):
    fields = settings(family)
    references = [reference_run(family, seed, **fields) for seed in (1, 2)]
    module = compiled(family, fields)
    # It is already compiled: this test is not about concurrent compilation in Dynamo.
    turns = threading.Barrier(2, timeout=60)  # Both threads make their n-th call at the same time.

    def generate(seed: int) -> list[Tensor]:
        def call(**inputs):
            turns.wait()
            return module(**inputs)

        torch.set_num_threads(1)  # Dynamo guards on it; a new thread has its own.
        recorder = Recorder(call)
        try:
            with torch.no_grad():  # The grad mode is per thread, too.
                denoise(recorder, family, family.prompt(seed), family.latents(seed), NUM_STEPS)
        except BaseException:
            turns.abort()
            raise
        return recorder.outputs

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(generate, (1, 2)))
    assert_both_sessions_found(module, family, references)
    for generated, reference in zip(outputs, references, strict=True):
        assert_bitwise(generated, outputs_of(reference))


@on_every_family
def test_pipelines_in_two_threads_that_share_a_transformer_do_not_affect_each_other(family):
    fields = settings(family)
    expected = [reference_pipeline_run(family, seed, **fields) for seed in (1, 2)]
    model = compiled_for_pipelines(family)  # Compiled before the threads start, as above.

    def generate(seed: int) -> list[Tensor]:
        torch.set_num_threads(1)
        pipe = family.pipeline(model)  # One pipeline per thread, because a scheduler counts its steps.
        return family.generate(pipe, family.prompt(seed), family.latents(seed), NUM_STEPS)

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(generate, (1, 2)))
    assert_both_sessions_found(model, family, [reference for reference, _ in expected])
    for latents, (_, alone) in zip(outputs, expected, strict=True):
        assert_bitwise(latents, alone)


# Graphs and compilers.


@on_every_family
def test_one_graph_without_breaks_serves_all_steps_and_generations(family):
    module = compiled(family, settings(family))
    # The negative prompt of QwenImage has a different length: one more graph, which serves all lengths.
    assert trace(family).num_graphs == (2 if family is QWEN_IMAGE else 1)
    assert not trace(family).graph_breaks
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            denoise(Recorder(module), family, family.prompt(seed), family.latents(seed), NUM_STEPS)
    assert not counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    for stats in every_session(module)[-2 * len(family.guidance_branches) :]:
        assert stats.num_steps == NUM_STEPS
        assert 0 < len(stats.cached_steps) < NUM_STEPS - WARMUP_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("family", [FLUX, WAN], ids=["flux", "wan"])
def test_inductor_gives_the_outputs_of_the_reference(family):
    fields = settings(family)
    reference = reference_run(family, seed=1, **fields)
    module = torch.compile(family.build(), backend=backend(inner="inductor", **fields), fullgraph=True)
    recorder = Recorder(module)
    records = iter(reference.records)

    def call(guidance_branch, **inputs):
        recorder(guidance_branch, **inputs)
        return next(
            records
        ).output  # The loop continues with the latents of the reference, so errors do not accumulate over the steps.

    denoise(call, family, family.prompt(1), family.latents(1), NUM_STEPS)
    assert_newest_sessions(module, family, reference)
    for output, record in zip(recorder.outputs, reference.records, strict=True):
        # Outputs are of order 1. Fused float32 kernels round differently, by up to 2e-6, on reused steps too.
        torch.testing.assert_close(output, record.output, rtol=0, atol=1e-5)
