"""The sessions of a module are bounded in bytes and in number; the least recently used one is dropped first."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.runtime.bounds import MAX_SESSIONS
from tests import tiny
from tests.fast_dispatches import enabled
from tests.sessions import every_session
from tests.tiny import TIMES, build, generate, latents, prompt, ran_blocks, step

ALL, FIRST = tiny.NUM_BLOCKS, 1
EVERY_OTHER = [1, 3, 5, 7]
# The state of one session: the residual of the first block, and the residual of each stream over the region.
BYTES = 2 * tiny.STREAM_BYTES + tiny.TEXT_BYTES


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def alone(seed: int, times: tuple[float, ...] = TIMES) -> list[Tensor]:
    return [record.output for record in tiny.reference(build(), prompt(seed), latents(seed), times).records]


def total_state_bytes(module: nn.Module) -> int:
    return sum(stats.state_bytes for stats in every_session(module))


def bounds(module: nn.Module) -> list[str]:
    return [stats.bound for stats in every_session(module)]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("cachedit")]


# Between generations.


def test_the_sessions_of_many_prompts_stay_within_the_limit():
    module, texts = enabled(build(), max_state_bytes=3 * BYTES + 1), [prompt(seed) for seed in range(6)]
    for seed, text in enumerate(texts):
        tiny.assert_bitwise(generate(module, text, latents(seed)), alone(seed))
        assert total_state_bytes(module) == min(seed + 1, 3) * BYTES
    assert bounds(module) == ["dropped-bytes"] * 3 + [""] * 3
    assert [stats.cached_steps for stats in every_session(module)] == [EVERY_OTHER] * 6
    assert [stats.peak_state_bytes for stats in every_session(module)] == [BYTES] * 6


def test_the_least_recently_used_generation_is_dropped_first():
    module, texts = enabled(build(), max_state_bytes=2 * BYTES), [prompt(seed) for seed in range(3)]
    for seed in (0, 1, 0, 2):  # The first prompt is used again before the third one.
        generate(module, texts[seed], latents(seed))
    # The sessions of the prompts 0, 1, 0, 2; the first one had ended.
    assert bounds(module) == ["", "dropped-bytes", "", ""]
    assert [stats.state_bytes for stats in every_session(module)] == [0, 0, BYTES, BYTES]


def test_the_guidance_branches_of_a_generation_are_dropped_together():
    module, texts = enabled(build(), max_state_bytes=3 * BYTES), [prompt(seed) for seed in range(4)]
    for pair in ((0, 1), (2, 3)):
        for timestep in TIMES[:3]:
            for seed in pair:
                step(module, texts[seed], timestep, latents(seed))
    assert bounds(module) == ["dropped-bytes"] * 2 + [""] * 2
    assert total_state_bytes(module) == 2 * BYTES


def test_the_history_of_a_forecaster_counts_towards_the_limit():
    fields = dict(forecaster="taylorseer", max_state_bytes=8 * BYTES)
    module, texts = enabled(build(), **fields), [prompt(seed) for seed in range(8)]
    for seed, text in enumerate(texts):
        generate(module, text, latents(seed))
    one = every_session(module)[-1].state_bytes
    assert one > BYTES
    assert total_state_bytes(module) == 8 * BYTES // one * one < 8 * BYTES


def test_without_a_limit_in_bytes_only_the_number_of_sessions_is_bounded():
    module, texts = enabled(build(), max_state_bytes=None), [prompt(seed) for seed in range(12)]
    for seed, text in enumerate(texts):
        generate(module, text, latents(seed), TIMES[:2])
    assert total_state_bytes(module) == 12 * BYTES


def test_a_changed_limit_takes_effect_at_the_next_step():
    module, texts = enabled(build()), [prompt(seed) for seed in range(4)]
    cachedit_fx.refresh_context(module, max_state_bytes=BYTES)
    for seed, text in enumerate(texts):
        generate(module, text, latents(seed))
    assert total_state_bytes(module) == BYTES


# A running generation.


@pytest.mark.parametrize("limit", [0, BYTES, 2 * BYTES - 1])
def test_a_running_generation_above_the_limit_is_reported_and_not_dropped(limit: int, caplog: pytest.LogCaptureFixture):
    module, texts = enabled(build(), max_state_bytes=limit), [prompt(1), prompt(2)]
    outputs: list[list[Tensor]] = [[], []]
    for timestep in TIMES:
        for recorded, text, seed in zip(outputs, texts, (1, 2), strict=True):
            recorded.append(step(module, text, timestep, latents(seed)))
    for recorded, seed in zip(outputs, (1, 2), strict=True):
        tiny.assert_bitwise(recorded, alone(seed))
    assert bounds(module)[-1] == "kept-over"
    (line,) = cachedit_fx.summary(module, logging=False).notes
    assert f"caches {2 * BYTES} bytes, more than max_state_bytes={limit}" in line
    assert not warnings_in(caplog)  # No state is lost.


def test_windows_of_a_prompt_are_one_generation():
    found = []
    for limit in (None, 0):
        module, text = enabled(build(), max_state_bytes=limit), prompt(1)
        for timestep in TIMES:
            for window in range(3):
                step(module, text, timestep, latents(window))
        found.append([(stats.num_steps, stats.cached_steps) for stats in every_session(module)])
    assert found[0] == found[1]
    assert all(cached for _, cached in found[0])


def test_a_running_pipeline_loses_no_guidance_branch():
    from tests.tiny_pipelines import PIPELINES

    tiny_wan = PIPELINES["wan"]
    found = []
    for limit in (None, 0):
        torch._dynamo.reset()
        pipe = tiny_wan.build()
        fields = dict(Fn_compute_blocks=1, residual_diff_threshold=1.0, max_warmup_steps=2, inner_backend="eager")
        cachedit_fx.enable_cache(pipe, **fields, max_state_bytes=limit)
        tiny_wan.run(pipe, 1, 5)
        found.append([(s.num_steps, s.cached_steps) for s in cachedit_fx.summary(pipe, logging=False)])
    assert found[0] == found[1]
    assert all(cached for _, cached in found[0])


# A dropped generation that continues.


def test_a_dropped_generation_that_continues_computes_again_and_warns(caplog: pytest.LogCaptureFixture):
    module, text = enabled(build(), max_state_bytes=BYTES), prompt(1)
    named: dict[str, list[Tensor]] = {"a": [], "b": []}
    plain = generate(build(), text, latents(1))
    for key, times in (("a", TIMES[:3]), ("b", TIMES[:3]), ("a", TIMES[3:]), ("b", TIMES[3:])):
        for timestep in times:
            with cachedit_fx.session(key):
                named[key].append(step(module, text, timestep, latents(1)))
    expected = alone(1, TIMES[:3]) + alone(1, TIMES[3:])  # The warm-up runs again.
    for outputs in named.values():
        tiny.assert_bitwise(outputs, expected)
        assert torch.equal(outputs[3], plain[3])
    found = every_session(module)
    assert [stats.bound for stats in found] == ["dropped-bytes", "dropped-bytes", "dropped-bytes", ""]
    assert [stats.began for stats in found] == ["new", "new", "state-dropped", "state-dropped"]
    assert [stats.num_dropped for stats in found] == [0, 1, 2, 3]
    (warning,) = warnings_in(caplog)
    for words in (f"max_state_bytes={BYTES}", "it has to compute again", "What to do: "):
        assert words in warning
    lines = str(cachedit_fx.summary(module, logging=False)).splitlines()
    limit = f"max_state_bytes={BYTES}"
    assert f"3 sessions were dropped, the least recently used first, to keep no more than {limit}." in lines


def test_a_new_generation_with_a_prompt_of_a_dropped_one_causes_no_warning(caplog: pytest.LogCaptureFixture):
    module, texts = enabled(build(), max_state_bytes=BYTES), [prompt(1), prompt(2)]
    for seed in (1, 2, 1):
        tiny.assert_bitwise(generate(module, texts[seed - 1], latents(seed)), alone(seed))
    assert [stats.began for stats in every_session(module)] == ["new"] * 3
    assert not warnings_in(caplog)


def test_a_window_whose_generation_was_dropped_within_a_step_is_not_confused_with_another():
    module, text, others = enabled(build(), max_state_bytes=0), prompt(1), [prompt(2), prompt(3)]

    def window(number: int, timestep: float) -> int:
        with cachedit_fx.session("windows"):
            return ran_blocks(module, text, timestep, latents(number))

    assert window(0, TIMES[0]) == ALL
    with cachedit_fx.session("other"):
        step(module, others[0], TIMES[0], latents(5))  # The state of the first window is dropped.
    assert window(1, TIMES[0]) == ALL
    # Its state is gone; the state of the second window would allow this step to be reused.
    assert window(0, TIMES[1]) == ALL
    found = [stats for stats in every_session(module) if "windows" in stats.session]
    assert ["call 2 of a step" in stats.session for stats in found] == [False, True, False]
    assert [stats.bound for stats in found[:1]] == ["dropped-bytes"]


# The number of sessions.


def test_a_session_dropped_because_there_are_too_many_is_reported():
    module, text = enabled(build()), prompt(1)
    for number in range(MAX_SESSIONS + 1):
        with cachedit_fx.session(number):
            step(module, text, 1.0, latents(1))
    assert bounds(module) == ["dropped-number"] + [""] * MAX_SESSIONS
    lines = str(cachedit_fx.summary(module, logging=False)).splitlines()
    limit = f"{MAX_SESSIONS} sessions"
    assert f"1 session was dropped, the least recently used first, to keep no more than {limit}." in lines


def test_sessions_dropped_before_a_reset_are_not_counted():
    module, texts = enabled(build(), max_state_bytes=0), [prompt(seed) for seed in range(3)]

    def run() -> Any:
        for seed, text in enumerate(texts):
            generate(module, text, latents(seed), TIMES[:2])
        return cachedit_fx.summary(module, logging=False).notes

    first = run()
    assert "2 sessions were dropped" in first[0]
    cachedit_fx.reset(module)
    assert run() == first
