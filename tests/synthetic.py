"""Small transformers, for each pattern one that fits it and one that almost fits it, and their graphs.

Every model takes latent tokens, a timestep and, if it has one, a text as keyword arguments, and returns a tuple.
`PATTERNS` maps a pattern's number to its model. The models are not trained, so caching them gives no useful outputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cachedit_fx import CacheConfig
from cachedit_fx.frontend.capture import copy_graph
from cachedit_fx.frontend.repeated_blocks import traced_once
from cachedit_fx.passes.analysis.cached_examples import cached_examples
from cachedit_fx.passes.analysis.runtime_plan import make_runtime_plan
from cachedit_fx.passes.graph_pass import PassContext
from cachedit_fx.passes.manager import plan_graph
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Region
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from cachedit_fx.patterns import Mismatch

BATCH, IMAGE, TEXT = 2, 6, 5  # The numbers of latent and text tokens differ, so that the streams' shapes differ.
CHANNELS, TEXT_WIDTH, WIDTH, HEADS = 8, 12, 16, 2
DEPTH = 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(tokens), *self.to_kv(context).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class AdaNorm(nn.Module):
    """A layer norm, shifted and scaled by the time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(tokens) * (1 + scale) + shift


def make_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class DualBlock(nn.Module):
    """Pattern 0: joint attention over image and text, and an MLP for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_context = AdaNorm(), AdaNorm()
        self.attn = Attention()
        self.mlp, self.mlp_context = make_mlp(), make_mlp()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        text_length = encoder_hidden_states.shape[1]
        joint = [self.norm_context(encoder_hidden_states, temb), self.norm(hidden_states, temb)]
        joint = torch.cat(joint, dim=1)
        mixed = self.attn(joint, joint)
        hidden_states = hidden_states + mixed[:, text_length:]
        hidden_states = hidden_states + self.mlp(hidden_states)
        encoder_hidden_states = encoder_hidden_states + mixed[:, :text_length]
        encoder_hidden_states = encoder_hidden_states + self.mlp_context(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


class DualBlockEncoderFirst(DualBlock):
    """Pattern 1."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, encoder_hidden_states = super().forward(hidden_states, encoder_hidden_states, temb)
        return encoder_hidden_states, hidden_states


class SelfBlock(nn.Module):
    """Pattern 3: self-attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = AdaNorm()
        self.attn = Attention()
        self.mlp = make_mlp()

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        normed = self.norm(hidden_states, temb)
        hidden_states = hidden_states + self.attn(normed, normed)
        hidden_states = hidden_states + self.mlp(hidden_states)
        return hidden_states


class CrossBlock(SelfBlock):
    """Pattern 2: attends to a text that does not change."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm(hidden_states, temb), encoder_hidden_states)
        hidden_states = hidden_states + self.mlp(hidden_states)
        return hidden_states


class EmitBlock(SelfBlock):
    """Pattern 4: also returns a text-like tensor that no other block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_encoder = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = super().forward(hidden_states, temb)
        encoder_hidden_states = self.to_encoder(hidden_states)
        return hidden_states, encoder_hidden_states


class EmitBlockEncoderFirst(EmitBlock):
    """Pattern 5."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, encoder_hidden_states = super().forward(hidden_states, temb)
        return encoder_hidden_states, hidden_states


class HalvingBlock(SelfBlock):
    """Drops every second token, so that its output does not continue its input."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return super().forward(hidden_states[:, ::2], temb)


class Transformer(nn.Module):
    """The parts around the blocks of all models. Its forward is that of pattern 3.

    Args:
        block: Makes a block if it is not the model's usual one; called `depth` times.
    """

    block_class: type[nn.Module] = SelfBlock

    def __init__(self, block: Callable[[], nn.Module] | None = None, depth: int = DEPTH) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(CHANNELS, WIDTH)
        self.time_embedder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList((block or self.block_class)() for _ in range(depth))
        self.norm_out = AdaNorm()
        self.proj_out = nn.Linear(WIDTH, CHANNELS)

    def embed_time(self, timestep: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(WIDTH // 2) * (-math.log(100) / (WIDTH // 2)))
        angles = timestep[:, None] * frequencies
        return self.time_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def unembed(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor]:
        return (self.proj_out(self.norm_out(hidden_states, temb)),)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states, temb)


class TextTransformer(Transformer):
    """A transformer that takes a text. Its forward is that of pattern 2."""

    block_class = CrossBlock

    def __init__(self, block: Callable[[], nn.Module] | None = None, depth: int = DEPTH) -> None:
        super().__init__(block, depth)
        self.context_embedder = nn.Linear(TEXT_WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.unembed(hidden_states, temb)


class DualStream(TextTransformer):
    block_class = DualBlock

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.unembed(hidden_states, temb)


class DualStreamEncoderFirst(TextTransformer):
    block_class = DualBlockEncoderFirst

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.unembed(hidden_states, temb)


class Emitting(Transformer):
    block_class = EmitBlock

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states + encoder_hidden_states.mean(dim=1, keepdim=True), temb)


class EmittingEncoderFirst(Transformer):
    block_class = EmitBlockEncoderFirst

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states + encoder_hidden_states.mean(dim=1, keepdim=True), temb)


PATTERNS: dict[int, Callable[..., Transformer]] = {
    0: DualStream,
    1: DualStreamEncoderFirst,
    2: TextTransformer,
    3: Transformer,
    4: Emitting,
    5: EmittingEncoderFirst,
}


class DropsText(TextTransformer):
    """Almost pattern 0 or 1: the last two blocks have no text."""

    def __init__(self) -> None:
        super().__init__(DualBlock)
        self.blocks[2], self.blocks[3] = SelfBlock(), SelfBlock()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.blocks:
            if isinstance(block, DualBlock):
                hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
            else:
                hidden_states = block(hidden_states, temb)
        return self.unembed(hidden_states, temb)


class DropsTokens(TextTransformer):
    """Almost pattern 0 or 1: every other token of the image is dropped between the second and the third block."""

    def __init__(self) -> None:
        super().__init__(DualBlock)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for i, block in enumerate(self.blocks):
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
            if i == 1:
                hidden_states = hidden_states[:, ::2]
        return self.unembed(hidden_states, temb)


class SkipsText(TextTransformer):
    """Almost pattern 2: every second block reads no text."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for i, block in enumerate(self.blocks):
            context = hidden_states if i % 2 else encoder_hidden_states
            hidden_states = block(hidden_states, context, temb)
        return self.unembed(hidden_states, temb)


class Halving(Transformer):
    """Almost pattern 3: the third block changes the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = HalvingBlock()


class EmitsForNobody(Emitting):
    """Almost pattern 4 or 5: the tensors that the blocks emit are never used."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states, _ = block(hidden_states, temb)
        return self.unembed(hidden_states, temb)


def make_inputs(model: nn.Module, seed: int = 0, time: float = 0.9, tokens: int = IMAGE) -> dict[str, Tensor]:
    """The inputs that the model takes: latents, a timestep and perhaps a text; equal for equal arguments."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(BATCH, tokens, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, TEXT_WIDTH, generator=generator),
        "timestep": torch.full((BATCH,), time),
    }
    return {name: inputs[name] for name in inspect.signature(model.forward).parameters if name in inputs}


@dataclass
class Captured:
    """The result of `rewrite` for a graph, and the arguments with which Dynamo called the graph."""

    found: Any = None
    arguments: tuple[Any, ...] = ()
    output: Any = None

    def arguments_with(self, old: dict[str, Any], new: dict[str, Any]) -> list[Any]:
        """The arguments with the model's inputs `old` replaced by `new`; the weights are unchanged."""
        swap = {id(tensor): new[name] for name, tensor in old.items()}
        return [swap.get(id(argument), argument) for argument in self.arguments]


def capture(
    model: nn.Module, inputs: dict[str, Any], rewrite: Callable[[fx.GraphModule], Any], *, dynamic: bool | None = None
) -> Captured:
    """Captures the model as one graph and calls `rewrite` with its labeled copy while Dynamo is still active."""
    captured = Captured()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.found = rewrite(copy_graph(gm, example_inputs))

        def run(*arguments: Any) -> Any:
            captured.arguments = arguments
            return gm.forward(*arguments)

        return run

    with traced_once(model):  # As `enable_cache` captures: Dynamo traces one of several equal blocks.
        captured.output = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(**inputs)
    return captured


def capture_plan(model: nn.Module, inputs: dict[str, Any] | None = None, **fields: Any) -> Captured:
    """The result of `plan_graph` for the model, with one Fn block unless `fields` of the configuration set another."""
    config = CacheConfig(**{"Fn_compute_blocks": 1, **fields})
    return capture(model, make_inputs(model) if inputs is None else inputs, lambda gm: plan_graph(gm, config))


def plan(model: nn.Module, inputs: dict[str, Any] | None = None, **fields: Any) -> Plan | tuple[Mismatch, ...]:
    """The result of `capture_plan` without the arguments."""
    return capture_plan(model, inputs, **fields).found


class CachedGraph(NamedTuple):
    gm: fx.GraphModule
    regions: tuple[Region, ...]


def insert_conditionals(plan: Plan, config: CacheConfig | None = None, *, exact: bool = False) -> CachedGraph:
    """The cached graph that the pass builds from a plan."""
    config = config or CacheConfig()
    context = PassContext(config, exact=exact, plan=plan, runtime_plan=make_runtime_plan(plan, config))
    return CachedGraph(InsertConditionals(context)(plan.gm).graph_module, plan.regions)


class HandStep:
    """A `Step` that computes if there is nothing to reuse, and records the values that it receives.

    Args:
        cached: The values that an earlier step recorded: region -> (residual, stored).
    """

    def __init__(self, regions: tuple[Region, ...], cached: dict[int, Any] | None = None) -> None:
        self.regions, self.given = regions, cached or {}
        self.updates: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.probes: list[list[float]] = []

    def before(self, region: int) -> Tensor:
        example = cached_examples(self.regions[region])[0]
        return self.given[region][0] if self.given else torch.ones(example.shape, dtype=example.dtype)

    def decide(self, region: int, probe: Tensor) -> bool:
        self.probes.append(probe.tolist())
        return not self.given

    def cached(self, region: int) -> tuple[Tensor | None, ...]:
        return self.given[region][1] if self.given else (None,) * len(self.regions[region].live_outs)

    def update(self, region: int, residual: Tensor, cached: tuple[Tensor, ...]) -> None:
        self.updates[region] = (residual, cached)
