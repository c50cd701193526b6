"""Tiny diffusers transformers whose residuals change from step to step like those of trained models.

`FAMILIES` maps a name to a `Family`: how to build the transformer, its inputs and the real pipeline
around it. `denoise` is the loop that pipelines run, reduced to the calls of the transformer.

A randomly initialized transformer is never worth caching: the outputs of its timestep MLP for neighboring
steps are unrelated (residual diffs of the first block of 0.4). `_calm` makes the weights smooth in time, as
training does: the diffs are then 0.03 to 0.2, so that a threshold in that range reuses some of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

BATCH = 2
SIDE = 6  # Latent tokens per image side.
TEXT = 7  # Text tokens of a prompt; differs from every number of image tokens used here.
NEGATIVE_TEXT = 5  # Text tokens of QwenImage's negative prompt.

Call = Callable[..., Tensor]  # (branch, **transformer inputs) -> velocity
Block = tuple[nn.Module, tuple[str, ...]]  # a block and the names of what it returns, in order


@dataclass(frozen=True)
class Prompt:
    """The inputs that a pipeline passes as the same, unchanged objects at every step of a generation.

    Attributes:
        cond: Transformer inputs of the prompt.
        uncond: Transformer inputs of the negative prompt; None for a model that is called once per step.
    """

    cond: dict[str, Any]
    uncond: dict[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """One kind of transformer, with everything that a test needs to run it.

    Attributes:
        name: Key in `FAMILIES`.
        threshold: A `residual_diff_threshold` that reuses a third to two thirds of the steps after 3
            of warm-up, different ones for seeds 1 and 2. Over 14 steps every diff differs from it
            by more than 0.5 %, so that decisions do not depend on rounding.
        guidance: Scale of classifier-free guidance with two calls per step; None for one call per step.
        timestep_scale: The timestep that the transformer gets at sigma 1.
        build: A new transformer, always with the same weights.
        chain: Its blocks in execution order, over all of its lists.
        prompt: The prompt of a seed, as new tensors.
        latents: The initial noise of a seed.
        pipeline: The real pipeline around a transformer; it takes embeddings and returns latents.
        generate: Runs such a pipeline: (pipeline, prompt, latents, number of steps) -> the latents
            after every step.
    """

    name: str
    threshold: float
    guidance: float | None
    timestep_scale: float
    build: Callable[[], nn.Module]
    chain: Callable[[nn.Module], list[Block]]
    prompt: Callable[[int], Prompt]
    latents: Callable[[int], Tensor]
    pipeline: Callable[[nn.Module], DiffusionPipeline]
    generate: Callable[[DiffusionPipeline, Prompt, Tensor, int], list[Tensor]]

    @property
    def guidance_branches(self) -> tuple[str, ...]:
        """The guidance branches of one step, in the order of their calls."""
        return ("cond",) if self.guidance is None else ("cond", "uncond")


def denoise_steps(call: Call, family: Family, prompt: Prompt, latents: Tensor, num_steps: int) -> Iterator[Tensor]:
    """The latents after each of `num_steps` Euler steps of flow matching, from sigma 1 to 0.

    Args:
        call: Runs the transformer; its first argument is the guidance branch, "cond" or "uncond".
        latents: The noise to begin with.
    """
    for sigma, next_sigma in pairwise(torch.linspace(1, 0, num_steps + 1).tolist()):
        timestep = torch.full((latents.shape[0],), sigma * family.timestep_scale)
        velocity = call("cond", hidden_states=latents, timestep=timestep, return_dict=False, **prompt.cond)
        if prompt.uncond is not None and family.guidance is not None:
            uncond = call("uncond", hidden_states=latents, timestep=timestep, return_dict=False, **prompt.uncond)
            velocity = uncond + family.guidance * (velocity - uncond)
        latents = latents + (next_sigma - sigma) * velocity
        yield latents


def denoise(call: Call, family: Family, prompt: Prompt, latents: Tensor, num_steps: int) -> Tensor:
    """The last of `denoise_steps`."""
    *_, last = denoise_steps(call, family, prompt, latents, num_steps)
    return last


def noise(*shape: int, seed: int) -> Tensor:
    """Unit Gaussian values, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _empty_prompt(length: int, width: int, *, seed: int) -> Tensor:
    """Embeddings of an empty prompt: all tokens are nearly equal."""
    return 2 * noise(1, 1, width, seed=seed) + 0.1 * noise(BATCH, length, width, seed=seed)


def _calm(time_linears: list[nn.Linear], adaln: list[nn.Linear], smoothing: float, gain: float) -> None:
    """Makes a random transformer's residuals change slowly from step to step.

    Args:
        time_linears: First linears of the MLPs for timestep and guidance, fed with 128 cosines and 128
            sines of t in 0..1000, at frequencies 10000^(-i/128).
        adaln: Linears that turn the time embedding into shifts, scales and gates.
        smoothing: Frequencies well above its inverse are removed from the timestep embedding.
        gain: Factor on the AdaLN linears' weights, so that the remaining frequencies have an effect.
    """
    frequency = 10000.0 ** (-torch.arange(128) / 128)
    for linear in time_linears:
        linear.weight.mul_(torch.exp(-((smoothing * frequency) ** 2) / 2).repeat(2))
    for linear in adaln:
        linear.weight.mul_(gain)


def _finish(model: nn.Module, family: Family) -> nn.Module:
    """`model`, with its output projection scaled to map unit noise to a unit velocity."""
    timestep = torch.full((BATCH,), 0.5 * family.timestep_scale)
    prompt = family.prompt(0).cond
    scale = 1 / model(hidden_states=family.latents(0), timestep=timestep, return_dict=False, **prompt)[0].std()
    model.proj_out.weight.mul_(scale)
    model.proj_out.bias.mul_(scale)
    return model.eval().requires_grad_(False)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def _run(pipe: DiffusionPipeline, num_steps: int, **inputs: Any) -> list[Tensor]:
    after_step: list[Tensor] = []

    def keep(_pipe, _step, _timestep, values):
        after_step.append(values["latents"].clone())
        return {}

    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=num_steps, output_type="latent", callback_on_step_end=keep, **inputs)
    return after_step


# FLUX: double blocks, then single blocks; guidance is an input, so there is one call per step.


def _flux_build() -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        adaln = [block.norm1.linear for block in model.transformer_blocks]
        adaln += [block.norm1_context.linear for block in model.transformer_blocks]
        adaln += [block.norm.linear for block in model.single_transformer_blocks]
        adaln += [model.norm_out.linear]
        embedder = model.time_text_embed
        time_linears = [embedder.timestep_embedder.linear_1, embedder.guidance_embedder.linear_1]
        _calm(time_linears, adaln, smoothing=60, gain=3)
        return _finish(model, FLUX)


def _flux_chain(model: nn.Module) -> list[Block]:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [(block, ("encoder_hidden_states", "hidden_states")) for block in blocks]


def _flux_prompt(seed: int) -> Prompt:
    rows = torch.arange(SIDE).repeat_interleave(SIDE)
    columns = torch.arange(SIDE).repeat(SIDE)
    return Prompt(
        dict(
            encoder_hidden_states=noise(BATCH, TEXT, 32, seed=seed),
            pooled_projections=3 * noise(BATCH, 32, seed=seed),
            guidance=torch.full((BATCH,), 3.5),
            txt_ids=torch.zeros(TEXT, 3),
            img_ids=torch.stack([torch.zeros(SIDE**2), rows, columns], dim=-1),
        )
    )


def _flux_pipeline(transformer: nn.Module) -> FluxPipeline:
    return FluxPipeline(
        scheduler=_scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _flux_generate(pipe: DiffusionPipeline, prompt: Prompt, latents: Tensor, num_steps: int) -> list[Tensor]:
    return _run(
        pipe,
        num_steps,
        prompt_embeds=prompt.cond["encoder_hidden_states"],
        pooled_prompt_embeds=prompt.cond["pooled_projections"],
        guidance_scale=3.5,
        latents=latents,
        height=SIDE * 16,
        width=SIDE * 16,
    )


FLUX = Family(
    name="flux",
    threshold=0.12,
    guidance=None,
    timestep_scale=1.0,
    build=_flux_build,
    chain=_flux_chain,
    prompt=_flux_prompt,
    latents=lambda seed: noise(BATCH, SIDE**2, 16, seed=seed),
    pipeline=_flux_pipeline,
    generate=_flux_generate,
)


# QwenImage: two streams in all blocks; the negative prompt has another text length.


def _qwen_build() -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        )
        _calm([model.time_text_embed.timestep_embedder.linear_1], [], smoothing=150, gain=1)
        for block in model.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(4)  # Otherwise the decisions do not depend on the prompt.
        return _finish(model, QWEN_IMAGE)


def _qwen_chain(model: nn.Module) -> list[Block]:
    return [(block, ("encoder_hidden_states", "hidden_states")) for block in model.transformer_blocks]


def _qwen_prompt(seed: int) -> Prompt:
    def branch(text: Tensor) -> dict[str, Any]:
        return dict(
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,  # The pipeline replaces a mask of ones by None.
            img_shapes=[[(1, SIDE, SIDE)]] * BATCH,
        )

    return Prompt(branch(noise(BATCH, TEXT, 16, seed=seed)), branch(_empty_prompt(NEGATIVE_TEXT, 16, seed=seed)))


def _qwen_pipeline(transformer: nn.Module) -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler=_scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )


def _qwen_generate(pipe: DiffusionPipeline, prompt: Prompt, latents: Tensor, num_steps: int) -> list[Tensor]:
    return _run(
        pipe,
        num_steps,
        prompt_embeds=prompt.cond["encoder_hidden_states"],
        prompt_embeds_mask=torch.ones(BATCH, TEXT, dtype=torch.long),
        negative_prompt_embeds=prompt.uncond["encoder_hidden_states"],
        negative_prompt_embeds_mask=torch.ones(BATCH, NEGATIVE_TEXT, dtype=torch.long),
        true_cfg_scale=QWEN_IMAGE.guidance,
        latents=latents,
        height=SIDE * 16,
        width=SIDE * 16,
    )


QWEN_IMAGE = Family(
    name="qwen_image",
    threshold=0.103,
    guidance=2.0,
    timestep_scale=1.0,
    build=_qwen_build,
    chain=_qwen_chain,
    prompt=_qwen_prompt,
    latents=lambda seed: noise(BATCH, SIDE**2, 16, seed=seed),
    pipeline=_qwen_pipeline,
    generate=_qwen_generate,
)


# Wan: one stream and cross-attention; both prompts are padded to one text length.


def _wan_build() -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=256,
            ffn_dim=64,
            num_layers=5,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )
        embedder = model.condition_embedder
        _calm([embedder.time_embedder.linear_1], [embedder.time_proj], smoothing=60, gain=3)
        return _finish(model, WAN)


def _wan_chain(model: nn.Module) -> list[Block]:
    return [(block, ("hidden_states",)) for block in model.blocks]


def _wan_prompt(seed: int) -> Prompt:
    return Prompt(
        dict(encoder_hidden_states=noise(BATCH, TEXT, 16, seed=seed)),
        dict(encoder_hidden_states=_empty_prompt(TEXT, 16, seed=seed)),
    )


def _wan_pipeline(transformer: nn.Module) -> WanPipeline:
    # The scheduler of the published checkpoints; unlike Euler's, its timesteps are integers.
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)


def _wan_generate(pipe: DiffusionPipeline, prompt: Prompt, latents: Tensor, num_steps: int) -> list[Tensor]:
    return _run(
        pipe,
        num_steps,
        prompt_embeds=prompt.cond["encoder_hidden_states"],
        negative_prompt_embeds=prompt.uncond["encoder_hidden_states"],
        guidance_scale=WAN.guidance,
        latents=latents,
        height=SIDE * 16,
        width=SIDE * 16,
        num_frames=5,
    )


WAN = Family(
    name="wan",
    threshold=0.07,
    guidance=2.0,
    timestep_scale=1000.0,
    build=_wan_build,
    chain=_wan_chain,
    prompt=_wan_prompt,
    latents=lambda seed: noise(BATCH, 4, 2, 2 * SIDE, 2 * SIDE, seed=seed),
    pipeline=_wan_pipeline,
    generate=_wan_generate,
)

FAMILIES = {family.name: family for family in (FLUX, QWEN_IMAGE, WAN)}
