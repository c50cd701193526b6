"""Only steps of the same guidance branch of the same generation share a session."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx.runtime.bounds import MAX_SESSIONS
from cachedit_fx.runtime.instance import MAX_FINISHED, Instance
from tests import tiny
from tests.sessions import every_session
from tests.tiny import TIMES, build, compiled, generate, latents, prompt, ran_blocks, step

ALL = tiny.NUM_BLOCKS  # Blocks that a computed step runs.
FIRST = 1  # Blocks that a reused step runs.
EVERY_OTHER = [1, 3, 5, 7]  # Steps that a generation at TIMES reuses.


def alone(seed, *, model=0, times=TIMES, **fields):
    """The outputs of a single generation with this prompt and noise, by the plain reference."""
    cache = tiny.reference(build(model), prompt(seed), latents(seed), times, **fields)
    assert any(record.reused for record in cache.records)
    return [record.output for record in cache.records]


def streams():
    """All live tensors with the width of a stream. After a run of a model, only the state of its sessions is live."""
    for _ in range(3):  # Objects that one round frees may hold those of the next.
        gc.collect()
    return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 3 and t.shape[-1] == tiny.WIDTH]


@pytest.fixture
def live_tensors():
    """A function that counts the live state tensors of this test."""
    gc.freeze()  # Earlier objects are neither collected nor listed.
    yield lambda: len(streams())
    gc.unfreeze()


# One generation after another.


def test_a_second_generation_from_the_same_prompt_object_starts_a_new_session():
    module, text = compiled(build()), prompt(1)
    tiny.assert_bitwise(generate(module, text, latents(1)), alone(1))
    second = tiny.reference(build(), text, latents(2))
    tiny.assert_bitwise(generate(module, text, latents(2)), [record.output for record in second.records])
    assert [stats.cached_steps for stats in every_session(module)] == [EVERY_OTHER, EVERY_OTHER]


def test_generations_from_different_prompts_start_new_sessions():
    module = compiled(build())
    prompts = [prompt(seed) for seed in (1, 2, 3)]
    for seed, text in zip((1, 2, 3), prompts, strict=True):
        tiny.assert_bitwise(generate(module, text, latents(seed)), alone(seed))
    assert [stats.num_steps for stats in every_session(module)] == [8, 8, 8]


def test_generations_with_increasing_timesteps_are_distinguished():
    module, text, times = compiled(build()), prompt(1), TIMES[::-1]
    for _ in range(2):
        tiny.assert_bitwise(generate(module, text, latents(1), times), alone(1, times=times))
    assert [stats.num_steps for stats in every_session(module)] == [8, 8]


def test_a_second_call_at_a_timestep_is_a_separate_branch():
    module, text = compiled(build()), prompt(1)
    times = (TIMES[0], *itertools.chain.from_iterable((t, t) for t in TIMES[1:]))  # As Heun's method calls.
    for _ in range(2):
        outputs = generate(module, text, latents(1), times)
        tiny.assert_bitwise([outputs[0], *outputs[1::2]], alone(1))
        tiny.assert_bitwise(outputs[2::2], alone(1, times=TIMES[1:]))
    assert [stats.num_steps for stats in every_session(module)] == [8, 7, 8, 7]
    assert every_session(module)[1].session.endswith("call 2 of a step")


def test_a_repeated_first_timestep_starts_a_new_generation():
    module, text = compiled(build(), max_warmup_steps=0), prompt(1)
    ran = [ran_blocks(module, text, 0.5, latents(seed)) for seed in (1, 1, 2, 3)]  # Generations with one step each.
    assert ran == [ALL] * 4
    assert [stats.decisions for stats in every_session(module)] == [["nothing-stored"]] * 4


# Conditioning.


def test_guidance_branches_are_distinguished_by_their_prompt_objects():
    module = compiled(build())
    texts = {1: prompt(1), 2: prompt(2)}
    for _generation in range(2):
        outputs = {1: [], 2: []}
        for timestep in TIMES:
            for guidance_branch, text in texts.items():
                outputs[guidance_branch].append(step(module, text, timestep, latents(guidance_branch)))
        for guidance_branch in texts:
            tiny.assert_bitwise(outputs[guidance_branch], alone(guidance_branch))
    assert len(every_session(module)) == 4


def test_a_prompt_with_the_shape_of_the_latents_distinguishes_branches():
    class SameShape(tiny.Transformer):
        def __init__(self):
            super().__init__()
            self.proj_text = torch.nn.Linear(4, tiny.WIDTH)

    module = compiled(SameShape().eval().requires_grad_(False))
    cond, uncond = latents(11), latents(12)
    ran = [ran_blocks(module, text, timestep, latents(1)) for timestep in TIMES[:2] for text in (cond, uncond)]
    assert ran == [ALL, ALL, FIRST, FIRST]
    assert len(every_session(module)) == 2


def test_live_prompts_of_equal_content_never_share_a_session():
    module, texts = compiled(build()), [prompt(1), prompt(1)]
    outputs = [[], []]
    for timestep in TIMES:
        for text, results, seed in zip(texts, outputs, (1, 2), strict=True):
            results.append(step(module, text, timestep, latents(seed)))
    for results, seed in zip(outputs, (1, 2), strict=True):
        expected = tiny.reference(build(), prompt(1), latents(seed))
        tiny.assert_bitwise(results, [record.output for record in expected.records])


def test_a_prompt_that_is_rebuilt_at_every_call_is_recognized_by_its_content():
    module = compiled(build())
    outputs = {1: [], 2: []}
    for timestep in TIMES:
        for guidance_branch, results in outputs.items():
            results.append(step(module, prompt(guidance_branch), timestep, latents(guidance_branch)))
    for guidance_branch, results in outputs.items():
        tiny.assert_bitwise(results, alone(guidance_branch))
    assert [stats.num_steps for stats in every_session(module)] == [8, 8]


def test_rebuilt_prompts_that_never_recur_use_bounded_memory(live_tensors):
    module = compiled(build())
    for seed in range(20):
        step(module, prompt(seed), 1.0, latents(1))
    running = [stats for stats in every_session(module) if stats.state_bytes]
    assert 1 <= len(running) <= 8
    assert live_tensors() == 3 * len(running)


def test_overwriting_a_prompt_in_place_starts_a_new_session():
    module, text = compiled(build()), prompt(1)
    first = generate(module, text, latents(1), TIMES[:3])
    tiny.assert_bitwise(first, alone(1, times=TIMES[:3]))
    text.copy_(1.001 * text)  # Too small a change for the diff; and the timestep continues as before.
    second = generate(module, text, latents(1), TIMES[3:])
    expected = tiny.reference(build(), text, latents(1), TIMES[3:])
    tiny.assert_bitwise(second, [record.output for record in expected.records])
    assert [stats.num_steps for stats in every_session(module)] == [3, 5]


def test_a_new_prompt_at_the_address_of_a_freed_one_starts_a_new_session():
    module = compiled(build())
    for seed in range(12):
        text = prompt(seed)
        ran = [ran_blocks(module, text, 1 - 0.02 * (2 * seed + i), latents(1)) for i in range(2)]
        assert ran == [ALL, FIRST]
        del text


def test_the_state_is_freed_with_the_prompt(live_tensors):
    module, text = compiled(build()), prompt(1)
    generate(module, text, latents(1))
    assert live_tensors() == 3
    assert every_session(module)[-1].state_bytes > 0
    del text
    assert live_tensors() == 0
    (stats,) = every_session(module)
    assert (stats.state_bytes, stats.num_steps, stats.cached_steps) == (0, 8, EVERY_OTHER)


def test_the_state_is_freed_with_the_module(live_tensors):
    model = build()
    module, text = compiled(model), prompt(1)
    generate(module, text, latents(1))
    assert live_tensors() == 3
    del module, model
    torch._dynamo.reset()
    assert live_tensors() == 0


# Named requests, threads and tasks.


def test_named_requests_that_share_a_prompt_object_are_separate():
    module, text = compiled(build()), prompt(1)
    outputs = {1: [], 2: []}
    for timestep in TIMES:
        for seed, results in outputs.items():
            with cachedit_fx.session(f"request {seed}"):
                results.append(step(module, text, timestep, latents(seed)))
    for seed, results in outputs.items():
        expected = tiny.reference(build(), text, latents(seed))
        tiny.assert_bitwise(results, [record.output for record in expected.records])
    assert [stats.session.split(",")[0] for stats in every_session(module)] == ["request 1", "request 2"]


def test_a_session_name_applies_only_inside_its_with_block():
    module, text = compiled(build()), prompt(1)
    with cachedit_fx.session("outer"):
        with pytest.raises(KeyError), cachedit_fx.session("inner"):
            raise KeyError
        step(module, text, 1.0, latents())
    step(module, text, 1.0, latents())
    labels = [stats.session for stats in every_session(module)]
    assert [label.startswith("outer") for label in labels] == [True, False]


@pytest.mark.parametrize("key", [None, [], {}])
def test_an_invalid_session_key_is_refused(key):
    with pytest.raises(TypeError), cachedit_fx.session(key):
        pytest.fail("entered")


def test_a_named_request_can_continue_in_any_thread():
    module, text = compiled(build()), prompt(1)

    def call(timestep):
        torch.set_num_threads(1)  # Dynamo guards on it; a new thread has its own.
        with cachedit_fx.session("request"):
            outputs.append(step(module, text, timestep, latents(1)))

    outputs = []
    for timestep in TIMES:
        thread = threading.Thread(target=call, args=(timestep,))
        thread.start()
        thread.join()
    tiny.assert_bitwise(outputs, alone(1))
    assert len(every_session(module)) == 1


def test_threads_that_share_a_prompt_object_never_mix():
    module, text = compiled(build()), prompt(1)
    step(module, text, 1.0, latents(9))  # Compiled before the threads start.
    turns = threading.Barrier(2, timeout=60)

    def run(seed):
        torch.set_num_threads(1)
        outputs = []
        for timestep in TIMES:
            turns.wait()
            outputs.append(step(module, text, timestep, latents(seed)))
        return outputs

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run, (1, 2)))
    for results, seed in zip(outputs, (1, 2), strict=True):
        expected = tiny.reference(build(), text, latents(seed))
        tiny.assert_bitwise(results, [record.output for record in expected.records])


@pytest.mark.parametrize("is_named", [True, False])
def test_async_tasks_that_share_a_prompt_object_never_mix(is_named):
    module, text = compiled(build()), prompt(1)

    async def run(seed):
        outputs = []
        for timestep in TIMES:
            outputs.append(step(module, text, timestep, latents(seed)))
            await asyncio.sleep(0)
        return outputs

    async def run_named(seed):
        with cachedit_fx.session(seed):
            return await run(seed)

    async def both():
        return await asyncio.gather(*map(run_named if is_named else run, (1, 2)))

    for results, seed in zip(asyncio.run(both()), (1, 2), strict=True):
        expected = tiny.reference(build(), text, latents(seed))
        tiny.assert_bitwise(results, [record.output for record in expected.records])


def test_a_prompt_can_be_freed_while_another_thread_resets(monkeypatch):
    instance, config, resetting = Instance(), tiny.config(), threading.Event()
    text = [prompt(1)]
    for _ in range(2):
        instance.open(config, text[0])
    clear = instance.conditioning.clear

    def slow_clear():
        resetting.set()
        time.sleep(0.3)  # Long enough for the prompt to be freed meanwhile.
        clear()

    def let_die():
        resetting.wait()
        text.clear()

    monkeypatch.setattr(instance.conditioning, "clear", slow_clear)
    threads = [threading.Thread(target=work, daemon=True) for work in (let_die, instance.clear)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=2)
    assert not any(thread.is_alive() for thread in threads), "deadlock"


# Modules.


def test_two_instances_of_a_class_share_a_graph_but_no_session():
    backend = cachedit_fx.Backend(tiny.config())
    modules = {seed: torch.compile(build(seed), backend=backend, fullgraph=True) for seed in (1, 2)}
    text = prompt(1)
    outputs = {1: [], 2: []}
    outputs[1].append(step(modules[1], text, TIMES[0], latents(1)))
    counters.clear()
    outputs[2].append(step(modules[2], text, TIMES[0], latents(1)))
    for timestep in TIMES[1:]:
        for seed, module in modules.items():
            outputs[seed].append(step(module, text, timestep, latents(1)))
    assert counters["stats"]["unique_graphs"] == 0
    for seed, module in modules.items():
        tiny.assert_bitwise(outputs[seed], alone(1, model=seed))
        (stats,) = every_session(module)
        assert (stats.num_steps, stats.cached_steps) == (8, EVERY_OTHER)


def test_loading_weights_keeps_the_graph_and_the_sessions():
    model = build()
    module, text = compiled(model), prompt(1)
    generate(module, text, latents(1), TIMES[:3])
    counters.clear()
    model.load_state_dict(build(5).state_dict())
    generate(module, text, latents(1), TIMES[3:])
    tiny.assert_bitwise(generate(module, text, latents(1)), alone(1, model=5))
    assert counters["stats"]["unique_graphs"] == 0
    assert [stats.num_steps for stats in every_session(module)] == [8, 8]


# Queries by the user.


def test_is_cached_is_true_after_the_first_cached_call():
    model, plain = build(), build()
    assert not cachedit_fx.is_cached(model)
    module = compiled(model)
    assert not cachedit_fx.is_cached(module)
    step(module, prompt(), 1.0, latents())
    step(plain, prompt(), 1.0, latents())
    assert cachedit_fx.is_cached(module)
    assert cachedit_fx.is_cached(model)
    assert not cachedit_fx.is_cached(plain)
    assert every_session(plain) == []
    assert str(every_session(plain)) == "no session has run yet"


@pytest.mark.parametrize("everything", [True, False])
def test_reset_ends_the_sessions_of_one_module_or_of_all(everything, live_tensors):
    modules, text = [compiled(build(seed)) for seed in (1, 2)], prompt(1)
    for module in modules:
        generate(module, text, latents(1), TIMES[:3])
    cachedit_fx.reset(*[] if everything else modules[:1])
    assert every_session(modules[0]) == []
    assert live_tensors() == (0 if everything else 3)
    assert all(cachedit_fx.is_cached(module) for module in modules)
    ran = [ran_blocks(module, text, TIMES[3], latents(1)) for module in modules]
    assert ran == [ALL, ALL if everything else FIRST]


def test_summary_reports_the_decisions_and_the_memory_of_a_session():
    module, text = compiled(build(), max_warmup_steps=2), prompt(1)
    generate(module, text, latents(1), TIMES[:5])
    (stats,) = every_session(module)
    assert isinstance(stats, cachedit_fx.inspect.CacheStats)
    assert stats.region == "blocks[1:4]"
    assert stats.decisions == ["warmup", "warmup", "diff-below", "diff-above", "diff-below"]
    assert (stats.num_steps, stats.cached_steps) == (5, [2, 4])
    # The probe is (1 + t) times a constant, so the diff is |t - t'| / (1 + t'), up to rounding in float32.
    assert stats.residual_diffs == pytest.approx({2: 0.1 / 1.9, 3: 0.2 / 1.9, 4: 0.1 / 1.7}, rel=1e-5)
    # The residual of the first block, and the residual of the region for each stream.
    assert stats.state_bytes == stats.peak_state_bytes == 2 * tiny.STREAM_BYTES + tiny.TEXT_BYTES
    generate(module, text, latents(1), TIMES[:1])
    finished, running = every_session(module)
    assert (finished.num_steps, finished.state_bytes, finished.peak_state_bytes) == (5, 0, stats.state_bytes)
    assert (running.num_steps, running.state_bytes) == (1, stats.state_bytes)


def test_summary_prints_the_table_of_cache_dit():
    module, text = compiled(build()), prompt(1)
    generate(module, text, latents(1))
    title, _, header, rule, row = str(every_session(module)).splitlines()
    assert title == "Cache Steps and Residual Diffs Statistics: Transformer"
    columns = "| Cache Steps | Diffs Min | Diffs P25 | Diffs P50 | Diffs P75 | Diffs P95 | Diffs Max |"
    assert header.startswith(columns)
    assert set(rule) == {"|", "-"}
    assert len(header) == len(rule) == len(row)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[0], cells[1], cells[6]) == ("4", "0.050", "0.125")
    assert str(every_session(module)[0]).splitlines()[0] == header


def test_a_table_without_diffs_shows_dashes():
    module = compiled(build())
    step(module, prompt(), 1.0, latents())
    row = str(every_session(module)).splitlines()[4]
    assert [cell.strip() for cell in row.strip("|").split("|")][:7] == ["0", *["-"] * 6]


def test_the_number_of_sessions_is_bounded(live_tensors):
    module, text = compiled(build()), prompt(1)
    count = MAX_SESSIONS + MAX_FINISHED + 5
    for number in range(count):
        with cachedit_fx.session(number):
            step(module, text, 1.0, latents(1))
    summary = every_session(module)
    running = [stats for stats in summary if stats.state_bytes]
    assert (len(running), len(summary)) == (MAX_SESSIONS, MAX_SESSIONS + MAX_FINISHED)
    assert [stats.session.split(",")[0] for stats in running] == [str(n) for n in range(count)[-MAX_SESSIONS:]]
    assert live_tensors() == 3 * MAX_SESSIONS
