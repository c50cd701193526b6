"""Several threads that call one module with the cache, cold and warm, with calls of several sizes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cachedit_fx.forecasters import PolynomialCalibratorConfig
from tests import tiny
from tests.fast_dispatches import enabled
from tests.tiny import build, generate, latents, prompt

TOKENS = (6, 8, 10)  # Numbers of latent tokens.


def generation(module: torch.nn.Module, seed: int, tokens: int) -> list[Tensor]:
    torch.set_num_threads(1)  # Dynamo guards on it; it is per thread, like the grad mode.
    with torch.no_grad():
        return generate(module, prompt(seed), latents(seed, tokens=tokens))


def alone(seed: int, tokens: int) -> list[Tensor]:
    with torch.no_grad():
        cache = tiny.reference(build(), prompt(seed), latents(seed, tokens=tokens))
    return [record.output for record in cache.records]


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_eight_threads_of_several_sizes_give_the_same_outputs_as_alone(is_warm: bool):
    module = enabled(build())
    if is_warm:
        generation(module, 1, TOKENS[0])
    jobs = [(seed, TOKENS[seed % len(TOKENS)]) for seed in range(8)]
    start = threading.Barrier(len(jobs), timeout=60)

    def run(job: tuple[int, int]) -> list[Tensor]:
        start.wait()
        return generation(module, *job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        outputs = [*pool.map(run, jobs)]
    for made, job in zip(outputs, jobs, strict=True):
        computed = [i for i, output in enumerate(alone(*job)) if torch.equal(output, made[i])]
        assert len(computed) >= 7, (job, computed)  # The first step of a second graph in a session is computed.
    assert len(generation(module, 9, TOKENS[1])) == 8


def test_forecasters_are_traced_while_other_threads_are_traced_and_called():
    """`make_fx` patches `torch.nn.Module` for all threads, and sets a flag at which Dynamo refuses every call."""
    module, plain = enabled(build(), forecaster=PolynomialCalibratorConfig()), build()
    jobs = [(seed, tokens) for seed, tokens in enumerate((6, 8, 10, 12))]
    start = threading.Barrier(len(jobs), timeout=60)

    def run(job: tuple[int, int]) -> list[Tensor]:
        start.wait()
        return [generation(module, *job)[0] for _ in range(3)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        outputs = [*pool.map(run, jobs)]
    for made, (seed, tokens) in zip(outputs, jobs, strict=True):
        with torch.no_grad():
            first = tiny.step(plain, prompt(seed), tiny.TIMES[0], latents(seed, tokens=tokens))
        tiny.assert_bitwise(made, [first] * 3)


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_threads_compile_no_more_graphs_than_sequential_calls(is_warm: bool):
    """Every graph counts towards the recompile limit of Dynamo, past which calls run without the cache."""
    jobs = [(seed, TOKENS[1 + seed % 2]) for seed in range(8)]
    start = threading.Barrier(len(jobs), timeout=60)

    def run_at_once(module: torch.nn.Module, job: tuple[int, int]) -> None:
        start.wait()
        generation(module, *job)

    def num_graphs(run_all: Callable[[torch.nn.Module], None]) -> int:
        torch._dynamo.reset()
        counters.clear()
        module = enabled(build())
        if is_warm:
            generation(module, 1, TOKENS[0])
        run_all(module)
        return counters["stats"]["unique_graphs"]

    def in_turn(module: torch.nn.Module) -> None:
        for job in jobs:
            generation(module, *job)

    def at_once(module: torch.nn.Module) -> None:
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(functools.partial(run_at_once, module), jobs))

    assert num_graphs(at_once) <= num_graphs(in_turn)
