"""A small transformer with two block lists of different patterns, and a pipeline that holds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import cachedit_fx
from tests.tiny import TIMES, WIDTH, Block, frozen, latents, prompt

DUAL = ("encoder_hidden_states", "hidden_states")  # What the blocks of the first list return.
SINGLE = ("hidden_states",)  # What the blocks of the second list return.


class DualBlock(Block):
    """Pattern 1."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, encoder_hidden_states = super().forward(hidden_states, encoder_hidden_states, scale)
        return encoder_hidden_states, hidden_states


class SingleBlock(nn.Module):
    """Pattern 3; every token depends on the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, scale: Tensor) -> Tensor:
        mean = hidden_states.mean(1, keepdim=True)
        hidden_states = hidden_states + scale * self.linear(hidden_states + mean).tanh()
        return hidden_states


class Hybrid(nn.Module):
    """Like FLUX.1: first image and text as two streams (pattern 1), then as one joined stream (pattern 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, WIDTH)
        self.proj_text = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(DualBlock() for _ in range(3))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(3))
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        hidden_states = self.proj_in(hidden_states)
        encoder_hidden_states = self.proj_text(encoder_hidden_states)
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, scale)
        text_length = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        for block in self.single_blocks:
            hidden_states = block(hidden_states, scale)
        return (self.proj_out(hidden_states[:, text_length:]),)


class LosesText(Hybrid):
    """Fits no pattern: the last block of the first list takes and returns only the image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = SingleBlock()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        hidden_states = self.proj_in(hidden_states)
        encoder_hidden_states = self.proj_text(encoder_hidden_states)
        for block in self.blocks:
            if isinstance(block, DualBlock):
                encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, scale)
            else:
                hidden_states = block(hidden_states, scale)
        return (self.proj_out(hidden_states),)


def build(kind: type[nn.Module] = Hybrid) -> Any:
    """A model in evaluation mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return frozen(kind())


def pipe_of(**components: Any) -> Any:
    """A minimal pipeline: an object that holds a transformer."""
    return SimpleNamespace(**components, components=components)


def config(**fields: Any) -> cachedit_fx.CacheConfig:
    """One warm-up step; all later steps are reused unless `fields` forbid it, with the last residual."""
    base = dict(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0, forecaster=None)
    base |= dict(inner_backend="eager")
    return cachedit_fx.CacheConfig(**base | fields)


def calls(times: tuple[float, ...] = TIMES, seed: int = 1) -> list[dict[str, Tensor]]:
    """Arguments of the calls of one generation, with the same prompt object and the same latents at every step."""
    text, image = prompt(seed), latents(seed)
    return [
        {
            "hidden_states": image,
            "encoder_hidden_states": text,
            "timestep": torch.full((image.shape[0],), time),
        }
        for time in times
    ]


def moving(seed: int = 1, times: tuple[float, ...] = TIMES) -> list[dict[str, Tensor]]:
    """Arguments of the calls of one generation whose latents change from step to step."""
    drift = latents(seed + 50)
    return [
        call | {"hidden_states": call["hidden_states"] + 0.3 * time * drift}
        for call, time in zip(calls(times, seed), times, strict=True)
    ]


def generate(model: nn.Module, times: tuple[float, ...] = TIMES) -> list[Tensor]:
    """The outputs of one generation."""
    return [model(**call)[0] for call in calls(times)]
