"""A small transformer with two block lists of different patterns, and the pipeline that it stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import cachedit_fx
from tests.synthetic import DualBlockEncoderFirst, SelfBlock, TextTransformer, make_inputs
from tests.tiny import frozen

TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
DUAL = ("encoder_hidden_states", "hidden_states")  # What the blocks of the first list return,
SINGLE = ("hidden_states",)  # and those of the second.


class Hybrid(TextTransformer):
    """As FLUX.1: first image and text beside each other (pattern 1), then joined (pattern 3)."""

    def __init__(self) -> None:
        super().__init__(DualBlockEncoderFirst, depth=3)
        self.single_blocks = nn.ModuleList(SelfBlock() for _ in range(3))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        text_length = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        for block in self.single_blocks:
            hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states[:, text_length:], temb)


def build(kind: type[nn.Module] = Hybrid) -> Any:
    """A model that is ready for inference, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return frozen(kind())


def pipe_of(**components: Any) -> Any:
    """The least that a pipeline is: something that holds a transformer."""
    return SimpleNamespace(**components, components=components)


def config(**fields: Any) -> cachedit_fx.CacheConfig:
    """One step to warm up, then whatever is allowed is reused."""
    base = dict(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0, inner_backend="eager")
    return cachedit_fx.CacheConfig(**base | fields)


def inputs_at(model: nn.Module, time: float, seed: int = 0) -> dict[str, Tensor]:
    return make_inputs(model, seed, time)


def generate(model: nn.Module, times: tuple[float, ...] = TIMES, **others: Any) -> list[Tensor]:
    """The outputs at all times, from one prompt that stays the same object."""
    given = make_inputs(model) | others
    return [model(**given | {"timestep": torch.full_like(given["timestep"], time)})[0] for time in times]
