"""The transformers with random weights that are measured, their prompts, and a denoising loop without a pipeline.

`WORKS` maps a name to a `Work`: the configuration of the transformer, its inputs, the number of steps of a generation,
and which of them are reused. Nothing is downloaded. `pipelines.py` puts the transformers into pipelines of diffusers.

The weights are changed so that residuals change slowly (see `_calm`). In a transformer as it is initialized,
neighboring timesteps result in unrelated inputs, and a cache would never reuse a step. The decisions are nevertheless
those of a mask, so that every cache does the same work.
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
    """Returns 1 (compute) or 0 (reuse) per step: `warmup` times 1, then 0, 0, 1 repeatedly."""
    return tuple(1 if i < warmup else int((i - warmup) % 3 == 2) for i in range(num_steps))


@dataclass(frozen=True)
class Work:
    """One size of one kind of transformer.

    Attributes:
        name: Its key in `WORKS`.
        title: Its title in tables.
        kind: The key in `KINDS` of the class of the transformer.
        config: The configuration of the transformer.
        grid: The latent tokens per side: (height, width), for a video (frames, height, width).
        text: The numbers of tokens of the prompt and, if guidance calls the transformer twice per step, of the negative
            prompt.
        guidance: The scale of classifier-free guidance; None for one call per step.
        num_steps: The number of steps of a generation.
        warmup: The number of first steps that are computed; `schedule` determines the others.
        dtype: The dtype of weights, prompts and latents.
        switch: The first step that a second transformer runs, in a pipeline that has two; None for one transformer.
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
    switch: int | None = None

    @property
    def steps(self) -> tuple[range, ...]:
        """The steps of each transformer."""
        if self.switch is None:
            return (range(self.num_steps),)
        return range(self.switch), range(self.switch, self.num_steps)

    @property
    def mask(self) -> tuple[int, ...]:
        """1 (compute) or 0 (reuse) for every step. Every transformer begins with its own warm-up."""
        return tuple(flag for steps in self.steps for flag in schedule(len(steps), self.warmup))

    @property
    def guidance_branches(self) -> tuple[str, ...]:
        """The guidance branches of one step, in the order of their calls."""
        return ("cond",) if self.guidance is None else ("cond", "uncond")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        return int(self.config["attention_head_dim"]) * int(self.config["num_attention_heads"])

    def stream_bytes(self, guidance_branch: str) -> dict[str, int]:
        """The bytes of each stream between two blocks, by role; without the text if blocks do not change it."""
        itemsize = getattr(torch, self.dtype).itemsize
        text = self.text[self.guidance_branches.index(guidance_branch)]
        sizes = {"hidden_states": self.num_tokens, "encoder_hidden_states": text}
        roles = sizes if self.kind != "wan" else ("hidden_states",)
        return {role: sizes[role] * self.width * itemsize for role in roles}

    def tiny(self) -> Work:
        """Returns the same work with the smallest sizes, for trial runs."""
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
            switch=None if self.switch is None else 3,
        )


@dataclass(frozen=True)
class Prompt:
    """The inputs of the transformer that are the same objects in all steps of a generation, by guidance branch."""

    inputs: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A class of transformers.

    Attributes:
        transformer: The class.
        timestep_scale: The timestep at sigma 1.
        lists: The names of its block lists, in execution order.
        smoothing: See `_calm`.
        gain: See `_calm`.
        linears: Returns, for a model, the first linear layers of its timestep MLPs, and those that compute scales and
            shifts from them.
        latents: Returns the initial noise for (work, generator).
        inputs: Returns the inputs of one guidance branch that belong to the prompt, for (work, text tokens, generator).
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
    """Returns the list and the number of every block, in execution order."""
    return [(name, i) for name in KINDS[work.kind].lists for i in range(len(getattr(model, name)))]


def build(work: Work, device: str = "cpu", seed: int = 0) -> nn.Module:
    """Returns a new transformer, with the same weights every time for the same seed on the same device."""
    kind = KINDS[work.kind]
    torch.manual_seed(seed)
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
    """Removes the middle blocks from `model`. The rest is what a reused step must run at least."""
    blocks = chain(work, model)
    kept = {*blocks[:front], *blocks[len(blocks) - back :]}
    for name in KINDS[work.kind].lists:
        modules = getattr(model, name)
        setattr(model, name, nn.ModuleList(block for i, block in enumerate(modules) if (name, i) in kept))
    return model


def prompt_of(work: Work, seed: int, device: str = "cpu") -> Prompt:
    """Returns a prompt with new tensors for every guidance branch."""
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
    """Returns one tensor per step, created before the loop so that no step creates it."""
    sigmas = torch.linspace(1, 0, work.num_steps + 1)[:-1] * KINDS[work.kind].timestep_scale
    return [sigma[None].to(device) for sigma in sigmas]


def denoise_step(call: Call, work: Work, prompt: Prompt, latents: Tensor, timestep: Tensor) -> Tensor:
    """Returns the latents after an Euler step of flow matching, with one call of the model per guidance branch."""
    common = dict(hidden_states=latents, timestep=timestep, return_dict=False)
    found = [call(guidance_branch, {**common, **inputs}) for guidance_branch, inputs in prompt.inputs.items()]
    velocity = found[0] if work.guidance is None else found[1] + work.guidance * (found[0] - found[1])
    return latents - velocity / work.num_steps


def _calm(kind: Kind, model: nn.Module) -> None:
    """Changes random weights so that the residuals change slowly from step to step, as in a trained transformer.

    Frequencies of the timestep well above 1/smoothing are removed from the first linear layers (whose inputs are 128
    cosines and 128 sines of t in 0..1000, at frequencies 10000^(-i/128)). The AdaLN weights are scaled by the gain, so
    that the remaining frequencies matter.
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
