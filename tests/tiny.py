"""A transformer that compiles fast and whose decisions are known in advance.

If the latents stay the same, the residual over the first block is (1 + t) times a constant, so the diff between two
steps is |t - t'| / (1 + t'), where t' is the timestep of the last computed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import cachedit_fx
from tests.reference import ReferenceCache

WIDTH = 24
BATCH = 2
TOKENS = 6
TEXT = 5
NUM_BLOCKS = 4
TIMES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
STREAM_BYTES = BATCH * TOKENS * WIDTH * 4
TEXT_BYTES = BATCH * TEXT * WIDTH * 4

Model = TypeVar("Model", bound=nn.Module)


class Watch:
    """Counts the blocks that run, and can make one of them raise.

    Attributes:
        ran: Number of blocks that ran since it was last set to 0.
        error: The error that the `error_at`-th following block raises; None for no error.
    """

    ran = 0
    error: BaseException | None = None
    error_at = 0


@torch.library.custom_op("cachedit_tests::watched", mutates_args=())
def watched(value: Tensor) -> Tensor:
    Watch.ran += 1
    if Watch.error is not None and Watch.ran == Watch.error_at:
        raise Watch.error
    return value.clone()


watched.register_fake(torch.empty_like)
watched.register_autograd(lambda _context, gradient: gradient)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(WIDTH, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        context = encoder_hidden_states.mean(1, keepdim=True)
        hidden_states = hidden_states + scale * watched(self.image(hidden_states + context).tanh())
        encoder_hidden_states = encoder_hidden_states + scale * self.text(encoder_hidden_states).tanh()
        return hidden_states, encoder_hidden_states


class Transformer(nn.Module):
    """Two streams; both are used after the blocks."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, WIDTH)
        self.proj_text = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep.to(hidden_states.dtype))[:, None, None]
        hidden_states = self.proj_in(hidden_states)
        encoder_hidden_states = self.proj_text(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, scale)
        return (self.proj_out(hidden_states + encoder_hidden_states.mean(1, keepdim=True)),)


class TextBlock(nn.Module):
    """Reads the prompt and returns only the hidden stream."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> Tensor:
        context = encoder_hidden_states.mean(1, keepdim=True).mean(2, keepdim=True)
        return hidden_states + scale * watched(self.image(hidden_states + context).tanh())


class TwoLists(nn.Module):
    """The blocks of the second list depend on the timestep only through the stream."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.blocks = nn.ModuleList(TextBlock() for _ in range(3))
        self.more = nn.ModuleList(TextBlock() for _ in range(3))
        self.proj_in = nn.Linear(4, WIDTH)
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        hidden_states = self.proj_in(hidden_states)
        for i, block in enumerate(self.blocks):
            if self.broken and i == 1:
                torch._dynamo.graph_break()
            hidden_states = block(hidden_states, encoder_hidden_states, scale)
        for block in self.more:
            hidden_states = block(hidden_states, encoder_hidden_states, torch.ones_like(scale))
        return (self.proj_out(hidden_states),)


class Bare(nn.Module):
    """The latents are the stream, and the streams are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, scale)
        return hidden_states, encoder_hidden_states


class Plain(nn.Module):
    """A model without a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(hidden_states) * timestep[:, None, None] + encoder_hidden_states.mean(),)


def frozen(model: Model) -> Model:
    """`model` in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


def build(seed: int = 0, *, num_blocks: int = NUM_BLOCKS) -> Transformer:
    """A transformer in eval mode, with the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return frozen(Transformer(num_blocks))


def prompt(seed: int = 1, *, batch: int = BATCH, length: int = TEXT) -> Tensor:
    """Returns a new tensor at every call, with equal values for equal arguments."""
    return torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(100 + seed))


def latents(seed: int = 1, *, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(200 + seed))


def fields(**others: Any) -> dict[str, Any]:
    """Fields with which every other step at `TIMES` adds the last residual, if the latents stay the same."""
    return dict(Fn_compute_blocks=1, residual_diff_threshold=0.08, max_warmup_steps=1, forecaster=None) | others


def config(**others: Any) -> cachedit_fx.CacheConfig:
    return cachedit_fx.CacheConfig(**fields(inner_backend="eager", **others))


def compiled(module: nn.Module, *, dynamic: bool | None = None, **others: Any) -> Any:
    return torch.compile(module, backend=cachedit_fx.Backend(config(**others)), fullgraph=True, dynamic=dynamic)


def step(module: Any, prompt: Tensor, timestep: float, latents: Tensor) -> Tensor:
    """The transformer's output at one timestep."""
    times = torch.full((latents.shape[0],), timestep)
    output: Tensor = module(hidden_states=latents, encoder_hidden_states=prompt, timestep=times)[0]
    return output


def generate(module: Any, prompt: Tensor, latents: Tensor, times: Iterable[float] = TIMES) -> list[Tensor]:
    """The outputs at all timesteps; the latents stay the same."""
    return [step(module, prompt, timestep, latents) for timestep in times]


def reference(
    module: Transformer, prompt: Tensor, latents: Tensor, times: Sequence[float] = TIMES, **others: Any
) -> ReferenceCache:
    """The same generation by the plain-Python reference, independent of all others."""
    blocks = [(block, ("hidden_states", "encoder_hidden_states")) for block in module.blocks]
    with ReferenceCache(module, blocks, **fields(**others)) as cache:
        for timestep in times:
            cache(
                "only",
                hidden_states=latents,
                encoder_hidden_states=prompt,
                timestep=torch.full((latents.shape[0],), timestep),
            )
    return cache


def ran_blocks(module: Any, prompt: Tensor, timestep: float, latents: Tensor) -> int:
    """The number of blocks that a step ran: all of them, or Fn + Bn."""
    Watch.ran = 0
    step(module, prompt, timestep, latents)
    return Watch.ran


def assert_bitwise(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(output, wanted, rtol=0, atol=0, msg=lambda text, i=index: f"step {i}: {text}")
