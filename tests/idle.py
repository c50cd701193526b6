"""Helpers of the tests of how calls are served."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.tiny import TIMES, build, config, generate, latents, prompt

CALLS = len(TIMES)
ALL_REUSED = dict(residual_diff_threshold=1.0)


def enabled(model: Any = None, **others: Any) -> Any:
    return cachedit_fx.enable_cache(build() if model is None else model, config(**others))


def run(model: Any, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return generate(model, prompt(seed), latents(seed))


def called(model: Any, method: str) -> list[Tensor]:
    """The outputs of a generation that calls a method of the model."""
    return run(getattr(model, method))


def counts(model: Any) -> CallCounts:
    """The call counts of the only module that the cache is enabled for."""
    (found,) = cachedit_fx.summary(model, logging=False).calls.values()
    return found


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the package since the last call of this function."""
    records = [r for r in caplog.records if r.name.startswith("cachedit_fx") and r.levelno >= logging.WARNING]
    caplog.clear()
    return [record.getMessage() for record in records]


class Guided(tiny.Transformer):
    """Has methods that samplers call: `forward_with_cfg`, and `decode`, which runs the blocks without the forward."""

    def forward_with_cfg(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        half = hidden_states[: len(hidden_states) // 2]
        return self.forward(torch.cat((half, half)), encoder_hidden_states, timestep)

    def decode(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        hidden_states, text = self.proj_in(hidden_states), self.proj_text(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, text = block(hidden_states, text, scale)
        return (self.proj_out(hidden_states),)

    def by_call(self, hidden_states: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        return (self(hidden_states, **others)[0], self.blocks[0].image.weight)

    def num_weights(self, of: Tensor) -> int:
        return sum(of.numel() for _ in self.blocks)
