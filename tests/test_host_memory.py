"""`cache_device="cpu"`: cached values are in host memory between two steps. Here, all of it is host memory."""

from __future__ import annotations

import pytest
import torch

from cachedit_fx.runtime import host_memory, step
from cachedit_fx.runtime.instances import instances_in
from tests import tiny
from tests.sessions import every_session

FORECASTERS = [None, "taylorseer", "foca"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def moves(monkeypatch):
    """Treats the device of the model as one with a memory of its own; returns the copies that were made."""
    copies = []

    def on_host(tensor):
        copies.append(host_memory.on_host(tensor))
        return copies[-1]

    monkeypatch.setattr(host_memory, "is_moved", lambda device: True)
    monkeypatch.setattr(step, "on_host", on_host)
    return copies


def outputs_and_sessions(**fields):
    model = tiny.build()
    cached = tiny.compiled(model, **fields)
    prompt = tiny.prompt()
    outputs = tiny.generate(cached, prompt, tiny.latents())
    held = [tensor for instance in instances_in(model) for tensor in held_by(instance)]
    del prompt  # The session ends with it.
    return outputs, every_session(model), held


def held_by(instance) -> list[torch.Tensor]:
    """The cached values of all sessions."""
    states = [state for session in instance._sessions.values() for state in session.snapshot.regions.values()]
    return [tensor for state in states for value in state.cached for tensor in value.tensors]


@pytest.mark.parametrize("forecaster", FORECASTERS)
def test_values_in_host_memory_change_nothing(moves, forecaster):
    expected, (before,), _ = outputs_and_sessions(forecaster=forecaster)
    assert not moves
    outputs, (after,), _ = outputs_and_sessions(forecaster=forecaster, cache_device="cpu")
    tiny.assert_bitwise(outputs, expected)
    assert after.cached_steps == before.cached_steps != []
    assert after.state_bytes == before.state_bytes


@pytest.mark.parametrize("forecaster", FORECASTERS)
def test_each_computed_value_is_copied_once_and_the_copy_is_what_a_session_holds(moves, forecaster):
    _, (stats,), held = outputs_and_sessions(forecaster=forecaster, cache_device="cpu")
    num_computed = stats.num_steps - len(stats.cached_steps)
    assert len(moves) == num_computed * 2  # The model has two streams.
    assert held
    assert all(any(tensor is copy for copy in moves) for tensor in held)


def test_a_device_that_is_host_memory_is_left_alone():
    model = tiny.build()
    cached = tiny.compiled(model, cache_device="cpu")
    tiny.generate(cached, tiny.prompt(), tiny.latents())
    assert not host_memory.is_moved(torch.device("cpu"))
    assert host_memory.is_moved(torch.device("cuda"))
