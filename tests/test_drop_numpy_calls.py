"""NumPy calls in a forward: those whose result became a number are removed, and those that are read remain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.fast_dispatches import enabled


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Ceiled(tiny.Transformer):
    """Computes a number with NumPy, like the transformers that take the outputs of a ControlNet."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        half = int(np.ceil(len(self.blocks) / 2))
        (made,) = super().forward(hidden_states, encoder_hidden_states, timestep)
        return (made * half,)


class Scaled(tiny.Transformer):
    """Computes values with NumPy."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = torch.from_numpy(np.linspace(1.0, 2.0, 4)).to(hidden_states.dtype)
        return super().forward(hidden_states * scale, encoder_hidden_states, timestep)


def test_a_number_that_numpy_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    module = enabled(tiny.frozen(Ceiled()), fast_dispatch=False)
    first = tiny.generate(module, tiny.prompt(), tiny.latents())
    changed: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changed.append)
    again = tiny.generate(module, tiny.prompt(), tiny.latents())
    assert changed == []
    tiny.assert_bitwise(again, first)


@pytest.mark.parametrize("kind", [Ceiled, Scaled])
def test_computed_steps_equal_those_of_the_model(kind: type[tiny.Transformer]):
    module = tiny.frozen(kind())
    expected = tiny.step(module, tiny.prompt(), tiny.TIMES[0], tiny.latents())
    outputs = tiny.generate(enabled(module), tiny.prompt(), tiny.latents())
    tiny.assert_bitwise(outputs[:1], [expected])
    assert len(outputs) == len(tiny.TIMES)
