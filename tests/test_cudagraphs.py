"""What CUDA graphs and the timing of steps need, as far as it can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.mutation_guard import GenerationTracker
from torch._functorch import aot_autograd
from torch._inductor import config as inductor_config

import cachedit_fx
from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.forecasters import compile as compile_forecasters
from cachedit_fx.frontend.fast_dispatch import NOT_SERVED, FastDispatcher
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.passes.piece import Piece
from cachedit_fx.runtime.stopwatch import Stopwatch
from tests import tiny
from tests.zoo import VARIANTS

FIELDS: dict[str, Any] = dict(max_warmup_steps=1, residual_diff_threshold=100.0, forecaster=None, on_no_match="raise")


@pytest.fixture
def _static_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of static inputs of every graph that AOTAutograd compiles, once per place that calls it."""
    found: list[int] = []
    num_calls = [1]
    read, compile_piece = aot_autograd._try_get_metadata_from_dynamo, InnerCompiler.compile_piece

    def spy(*args: Any) -> Any:
        result = read(*args)
        found.extend([len(result[1])] * num_calls[0])
        return result

    def compile_and_count(self: InnerCompiler, piece: Piece) -> None:
        num_calls[0] = len(piece.calls)
        compile_piece(self, piece)

    monkeypatch.setattr(aot_autograd, "_try_get_metadata_from_dynamo", spy)
    monkeypatch.setattr(InnerCompiler, "compile_piece", compile_and_count)
    yield found


def _num_static(found: list[int], **compile_kwargs: Any) -> int:
    torch._dynamo.reset()
    found.clear()
    model = VARIANTS["Wan"].build()
    with torch.no_grad():
        torch.compile(model, **compile_kwargs)(**VARIANTS["Wan"].inputs(900.0))
    return sum(found)


def test_the_weights_of_pieces_are_static_inputs(_static_inputs: list[int]):
    """CUDA graphs copy the other inputs at every call. Two pieces may both use a weight."""
    control = _num_static(_static_inputs, backend="aot_eager")
    options = dict(FIELDS, inner_backend="cudagraphs", Fn_compute_blocks=1)  # Records nothing on a CPU.
    cached = _num_static(_static_inputs, backend="cachedit", options=options)
    assert control > 0
    assert cached >= control, _static_inputs
    assert _num_static(_static_inputs, backend="cachedit", options=options | dict(inner_backend="aot_eager")) == 0


def test_every_call_begins_a_generation_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch):
    """Also a call that is served without Dynamo; otherwise buffers of all calls would stay in use."""
    served: list[bool] = []
    dispatch = FastDispatcher.__call__

    def spy(self: FastDispatcher, args: Any, kwargs: Any) -> Any:
        result = dispatch(self, args, kwargs)
        served.append(result is not NOT_SERVED)
        return result

    monkeypatch.setattr(FastDispatcher, "__call__", spy)
    model, prompt, latents = tiny.build(), tiny.prompt(), tiny.latents()
    cachedit_fx.enable_cache(model, **FIELDS, inner_backend="eager")
    generations = []
    with torch.no_grad():
        for timestep in (900.0, 800.0, 700.0):
            tiny.step(model, prompt, timestep, latents)
            generations.append(GenerationTracker.generation)
    assert served == [False, True, True]
    assert len({*generations}) == 3, generations


def test_cuda_graphs_of_the_global_configuration_are_known():
    """Their buffers are written over by the next call, so what is cached has to be copied."""
    assert not InnerCompiler(CacheConfig(), None, {}).owns_buffers
    with inductor_config.patch({"triton.cudagraphs": True}):
        assert InnerCompiler(CacheConfig(), None, {}).owns_buffers
        assert not InnerCompiler(CacheConfig(), None, {"triton.cudagraphs": False}).owns_buffers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_device_without_events_is_timed_by_the_host(device: str):
    assert 0 <= Stopwatch(torch.device(device)).stop().seconds < 60


def test_numbers_of_a_forecaster_are_pinned_on_the_cpu_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch):
    """Other memory cannot be pinned. Without `device`, they are made on the device of `torch.set_default_device`."""
    create = torch.tensor

    def unpinned(numbers: Any, *, device: str, pin_memory: bool, **options: Any) -> Any:
        assert pin_memory
        made = create(numbers, device=device, **options)
        return SimpleNamespace(to=lambda _device, non_blocking: (made, non_blocking))

    monkeypatch.setattr(torch, "tensor", unpinned)
    numbers, is_asynchronous = compile_forecasters._on_device([1.0, 2.0], torch.device("cuda"))
    assert (numbers.device.type, is_asynchronous) == ("cpu", True)
