"""What is generated: transformers with random weights, their prompts and the loop around them.

`WORKS` maps a name to a `Work`: how the transformer is configured, what it is fed with, how many steps a generation
takes and which of them are to be reused. Nothing is downloaded.

The weights are made calm (see `_calm`): of a transformer as it is initialised, neighbouring timesteps make unrelated
inputs, and a cache would never be used. The decisions are those of a mask all the same, so that every cache does the
same work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Call = Callable[[str, dict[str, Any]], Tensor]  # (branch, inputs of the transformer) -> velocity
Sizes = tuple[int, ...]


def schedule(num_steps: int, warmup: int) -> tuple[int, ...]:
    """Per step 1 (compute) or 0 (reuse): `warmup` computed steps, then always two reused and one computed."""
    return tuple(1 if i < warmup else int((i - warmup) % 3 == 2) for i in range(num_steps))


@dataclass(frozen=True)
class Work:
    """One size of one kind of transformer.

    Attributes:
        name: Key in `WORKS`.
        title: What a table says of it.
        kind: The transformer's class and what belongs to it: a key of `KINDS`.
        config: Of the transformer.
        grid: Latent tokens per side: (height, width), for a video (frames, height, width).
        text: Tokens of the prompt and, where guidance calls the transformer twice per step, of the negative prompt.
        guidance: Scale of classifier-free guidance; None for one call per step.
        num_steps, warmup: Of a generation; which steps are computed follows from them (`schedule`).
        dtype: Of weights, prompts and latents.
        interleave: What variants take turns at: a "step" where one takes long, else a "generation".
    """

    name: str
    title: str
    kind: str
    config: dict[str, Any] = field(hash=False)
    grid: Sizes
    text: Sizes
    guidance: float | None = None
    num_steps: int = 14
    warmup: int = 3
    dtype: str = "float32"
    interleave: str = "generation"

    @property
    def mask(self) -> tuple[int, ...]:
        return schedule(self.num_steps, self.warmup)

    @property
    def guidance_branches(self) -> tuple[str, ...]:
        """The calls of one step, in order."""
        return ("cond",) if self.guidance is None else ("cond", "uncond")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        return int(self.config["attention_head_dim"]) * int(self.config["num_attention_heads"])

    def stream_bytes(self, guidance_branch: str) -> dict[str, int]:
        """Size of what one block hands to the next, by role; without the text where blocks don't change it."""
        itemsize = getattr(torch, self.dtype).itemsize
        text = self.text[self.guidance_branches.index(guidance_branch)]
        sizes = {"hidden_states": self.num_tokens, "encoder_hidden_states": text}
        roles = sizes if self.kind != "wan" else ("hidden_states",)
        return {role: sizes[role] * self.width * itemsize for role in roles}

    def tiny(self) -> Work:
        """The same in the smallest sizes: for trying things out, not for figures."""
        head = dict(attention_head_dim=16, num_attention_heads=2)
        layers = {name: 2 for name in ("num_layers", "num_single_layers") if name in self.config}
        small: dict[str, dict[str, Any]] = {
            "flux": dict(in_channels=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
            "qwen": dict(
                in_channels=16, out_channels=4, joint_attention_dim=32, axes_dims_rope=(8, 4, 4), num_layers=3
            ),
            "wan": dict(in_channels=4, out_channels=4, text_dim=32, ffn_dim=64, num_layers=3),
        }
        return dataclasses.replace(
            self,
            title=f"{self.title}, shrunk to a few blocks of width 32",
            config={**self.config, **head, **layers, **small[self.kind]},
            grid=tuple(min(side, 4) for side in self.grid),
            text=tuple(7 - 2 * (self.kind == "qwen") * i for i in range(len(self.text))),
            num_steps=6,
            warmup=2,
        )


@dataclass(frozen=True)
class Prompt:
    """The transformer's inputs that stay the same objects throughout a generation, by branch."""

    inputs: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What one class of transformers needs.

    Attributes:
        transformer: The class.
        timestep_scale: The timestep that it gets at sigma 1.
        lists: Names of its block lists, in execution order.
        smoothing, gain: See `_calm`.
        linears: model -> the first linears of its timestep MLPs, and those that turn them into scales and shifts.
        latents: (work, generator) -> the noise to begin with.
        inputs: (work, text tokens, generator) -> the prompt's inputs of one branch.
    """

    transformer: type[nn.Module]
    timestep_scale: float
    lists: tuple[str, ...]
    smoothing: float
    gain: float
    linears: Callable[[nn.Module], tuple[list[nn.Linear], list[nn.Linear]]]
    latents: Callable[[Work, torch.Generator], Tensor]
    inputs: Callable[[Work, int, torch.Generator], dict[str, Any]]


def chain(work: Work, model: nn.Module) -> list[tuple[str, int]]:
    """List and number of every block, in execution order."""
    return [(name, i) for name in KINDS[work.kind].lists for i in range(len(getattr(model, name)))]


def build(work: Work, device: str = "cpu") -> nn.Module:
    """A new transformer, always with the same weights on the same device."""
    kind = KINDS[work.kind]
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, work.dtype))  # 12 billion weights are not to be made in float32 first.
    try:
        with torch.device(device), torch.no_grad():
            model = kind.transformer(**work.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        _calm(kind, model)
        inputs = prompt_of(work, 0, device).inputs["cond"]
        timestep = timesteps_of(work, device)[work.num_steps // 2]
        latents = latents_of(work, 0, device)
        velocity = model(hidden_states=latents, timestep=timestep, return_dict=False, **inputs)[0]
        scale = 1 / velocity.float().std().item()  # Unit noise is mapped to a unit velocity.
        model.proj_out.weight.mul_(scale)
        model.proj_out.bias.mul_(scale)
    return model


def keep_blocks(work: Work, model: nn.Module, front: int, back: int) -> nn.Module:
    """`model` without its middle blocks: what a reused step has to run at least."""
    blocks = chain(work, model)
    kept = {*blocks[:front], *blocks[len(blocks) - back :]}
    for name in KINDS[work.kind].lists:
        modules = getattr(model, name)
        setattr(model, name, nn.ModuleList(block for i, block in enumerate(modules) if (name, i) in kept))
    return model


def prompt_of(work: Work, seed: int, device: str = "cpu") -> Prompt:
    """New tensors for every branch."""
    generator, dtype, made = torch.Generator().manual_seed(seed), getattr(torch, work.dtype), {}
    for guidance_branch, text in zip(work.guidance_branches, work.text, strict=True):
        inputs = KINDS[work.kind].inputs(work, text, generator)
        made[guidance_branch] = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
    return Prompt(made)


def latents_of(work: Work, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return KINDS[work.kind].latents(work, generator).to(device, getattr(torch, work.dtype))


def timesteps_of(work: Work, device: str = "cpu") -> list[Tensor]:
    """One tensor per step, made before the loop so that no step has to."""
    sigmas = torch.linspace(1, 0, work.num_steps + 1)[:-1] * KINDS[work.kind].timestep_scale
    return [sigma[None].to(device) for sigma in sigmas]


def denoise_step(call: Call, work: Work, prompt: Prompt, latents: Tensor, timestep: Tensor) -> Tensor:
    """The latents one Euler step of flow matching on, after a call of the transformer for each guidance branch."""
    common = dict(hidden_states=latents, timestep=timestep, return_dict=False)
    found = [call(guidance_branch, {**common, **inputs}) for guidance_branch, inputs in prompt.inputs.items()]
    velocity = found[0] if work.guidance is None else found[1] + work.guidance * (found[0] - found[1])
    return latents - velocity / work.num_steps


def _calm(kind: Kind, model: nn.Module) -> None:
    """Makes a random transformer's residuals change slowly from step to step, as training does.

    Frequencies of the timestep well above 1/smoothing are taken out of the first linears (fed with 128 cosines and 128
    sines of t in 0..1000, at frequencies 10000^(-i/128)); AdaLN weights are scaled so that what is left matters.
    """
    time_linears, adaln = kind.linears(model)
    frequency = 10000.0 ** (-torch.arange(128) / 128)
    factor = torch.exp(-((kind.smoothing * frequency) ** 2) / 2).repeat(2)
    for linear in time_linears:
        linear.weight.mul_(factor.to(linear.weight))
    for linear in adaln:
        linear.weight.mul_(kind.gain)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _flux_linears(model: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    embedder = model.time_text_embed
    names = [name for name in ("timestep_embedder", "guidance_embedder") if hasattr(embedder, name)]
    adaln = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    adaln += [block.norm.linear for block in model.single_transformer_blocks]
    return [getattr(embedder, name).linear_1 for name in names], [*adaln, model.norm_out.linear]


def _flux_inputs(work: Work, text: int, generator: torch.Generator) -> dict[str, Any]:
    height, width = work.grid
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    inputs: dict[str, Any] = dict(
        encoder_hidden_states=_normal(generator, 1, text, work.config["joint_attention_dim"]),
        pooled_projections=3 * _normal(generator, 1, work.config["pooled_projection_dim"]),
        txt_ids=torch.zeros(text, 3),
        img_ids=torch.stack([torch.zeros(height * width), rows, columns], dim=-1),
    )
    if work.config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((1,), 3.5)
    return inputs


def _qwen_inputs(work: Work, text: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(
        encoder_hidden_states=_normal(generator, 1, text, work.config["joint_attention_dim"]),
        encoder_hidden_states_mask=None,  # What the pipeline makes of a mask of ones.
        img_shapes=[[(1, *work.grid)]],
    )


def _wan_latents(work: Work, generator: torch.Generator) -> Tensor:
    frames, height, width = work.grid
    return _normal(generator, 1, work.config["in_channels"], frames, 2 * height, 2 * width)


KINDS = {
    "flux": Kind(
        diffusers.FluxTransformer2DModel,
        timestep_scale=1.0,
        lists=("transformer_blocks", "single_transformer_blocks"),
        smoothing=60,
        gain=3,
        linears=_flux_linears,
        latents=lambda work, generator: _normal(generator, 1, work.num_tokens, work.config["in_channels"]),
        inputs=_flux_inputs,
    ),
    "qwen": Kind(
        diffusers.QwenImageTransformer2DModel,
        timestep_scale=1.0,
        lists=("transformer_blocks",),
        smoothing=150,
        gain=1,
        linears=lambda model: ([model.time_text_embed.timestep_embedder.linear_1], []),
        latents=lambda work, generator: _normal(generator, 1, work.num_tokens, work.config["in_channels"]),
        inputs=_qwen_inputs,
    ),
    "wan": Kind(
        diffusers.WanTransformer3DModel,
        timestep_scale=1000.0,
        lists=("blocks",),
        smoothing=60,
        gain=3,
        linears=lambda model: (
            [model.condition_embedder.time_embedder.linear_1],
            [model.condition_embedder.time_proj],
        ),
        latents=_wan_latents,
        inputs=lambda work, text, generator: dict(
            encoder_hidden_states=_normal(generator, 1, text, work.config["text_dim"])
        ),
    ),
}
