"""A forked process has the compiled graphs, but no session and no lock of its parent. A spawned one gets a copy."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import forking
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import CALLS, counts, enabled, run
from tests.tiny import TIMES, build, compiled, latents, prompt

SECONDS = 60  # A process that waits for a lock is killed after this time.
HALF = CallCounts(computed=CALLS // 2, reused=CALLS // 2)


def outputs_and_counts(model: Any, seed: int = 1) -> tuple[list[Any], CallCounts, int]:
    """The outputs of a generation, how its calls were served, and the number of graphs that Dynamo compiled."""
    counters.clear()
    torch.set_num_threads(1)
    outputs = [output.tolist() for output in run(model, seed)]
    return outputs, counts(model), counters["stats"]["unique_graphs"]


def in_process(start_method: str, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in another process."""
    with multiprocessing.get_context(start_method).Pool(1) as pool:
        return pool.apply_async(function, args).get(SECONDS)


def forked(function: Callable[[], Any]) -> Any:
    """What the function, which is not pickled, returns in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()))
    process.start()
    try:
        assert receiver.poll(SECONDS), "the forked process waits for ever"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def expected(seed: int = 1) -> list[Any]:
    with torch.no_grad():
        return [record.output.tolist() for record in tiny.reference(build(), prompt(seed), latents(seed)).records]


def test_a_forked_process_uses_the_graphs_of_its_parent_and_counts_its_own_calls():
    model = enabled()
    run(model)
    assert forked(lambda: outputs_and_counts(model, 2)) == (expected(2), HALF, 0)
    assert counts(model) == HALF


@pytest.mark.parametrize("make", [enabled, lambda: compiled(build())], ids=["enable_cache", "backend"])
def test_a_forked_process_continues_no_generation_of_its_parent(make: Callable[[], Any]):
    model, text, noise = make(), prompt(), latents()

    def step(number: int) -> list[int]:
        """Makes a step, and returns the numbers of the reused steps of the session."""
        tiny.step(model, text, TIMES[number], noise)
        (stats,) = cachedit_fx.summary(model, logging=False)
        return stats.cached_steps

    with torch.no_grad():
        assert [step(0), step(1)] == [[], [1]]
        assert forked(lambda: [step(2), step(3)]) == [[], [1]]  # The first step of a session is computed.
        assert [step(2), step(3)] == [[1], [1, 3]]


def test_a_forked_process_waits_for_no_lock_that_another_thread_held():
    model = enabled()
    run(model)
    is_held, may_release = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as held:
            for lock in [*forking._locks]:
                held.enter_context(lock)
            is_held.set()
            may_release.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(SECONDS)

    def another_size() -> tuple[list[Any], int, CallCounts]:
        again, calls, _ = outputs_and_counts(model)
        more = enabled(build(num_blocks=3))
        run(more)
        return again, calls.total, counts(more)

    try:
        assert forked(another_size) == (expected(), CALLS, HALF)
    finally:
        may_release.set()
        thread.join()


def test_a_spawned_process_gets_a_module_that_is_enabled_with_the_same_settings():
    model = enabled()
    run(model)
    outputs, calls, graphs = in_process("spawn", outputs_and_counts, model, 2)
    assert (outputs, calls, graphs) == (expected(2), HALF, 1)
    assert counts(model) == HALF
