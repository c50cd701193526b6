"""FLUX and similar ones: packed image tokens and text tokens, in one or two lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, DUAL, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant, noise

TWO_LISTS = {"transformer_blocks": DUAL, "single_transformer_blocks": DUAL}
JOINED = {"transformer_blocks": DUAL, "single_transformer_blocks": SINGLE}
NUM_CONTROLS = 2  # Number of residuals that a ControlNet adds between blocks; each is used for half of the blocks.
WIDTH = 32


def _packed(setting: Setting, channels: int = 4, text_width: int = 32) -> Inputs:
    tokens = setting.side**2
    return dict(
        hidden_states=setting.noise(BATCH, tokens, channels),
        encoder_hidden_states=setting.noise(BATCH, setting.length, text_width),
        img_ids=noise(tokens, 3),
        txt_ids=noise(setting.length, 3),
    )


def _flux(setting: Setting) -> Inputs:
    return _packed(setting) | dict(
        pooled_projections=setting.noise(BATCH, 32),
        guidance=torch.full((BATCH,), 3.5),
        timestep=setting.floats(1e-3),
    )


def _chroma(setting: Setting) -> Inputs:
    return _packed(setting) | dict(timestep=setting.floats(1e-3))


def _bria(setting: Setting) -> Inputs:
    return _packed(setting) | dict(timestep=setting.floats())


def _flux_controlnet(setting: Setting) -> Inputs:
    shape = (BATCH, setting.side**2, WIDTH)
    return _flux(setting) | dict(
        controlnet_block_samples=setting.noises(NUM_CONTROLS, *shape),
        controlnet_single_block_samples=setting.noises(NUM_CONTROLS, *shape),
    )


def _fibo(setting: Setting) -> Inputs:
    layers = setting.noises(2 * NUM_BLOCKS, BATCH, setting.length, 32)
    return _packed(setting, channels=48, text_width=64) | dict(timestep=setting.floats(), text_encoder_layers=layers)


def _flux2(setting: Setting) -> Inputs:
    one, side, tokens = torch.arange(1), torch.arange(setting.side), torch.arange(setting.length)
    return _packed(setting) | dict(
        img_ids=torch.cartesian_prod(one, side, side, one)[None].expand(BATCH, -1, -1),
        txt_ids=torch.cartesian_prod(one, one, one, tokens)[None].expand(BATCH, -1, -1),
        timestep=setting.floats(1e-3),
        guidance=torch.full((BATCH,), 3.5),
    )


def _qwen(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, setting.side**2, 16),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_hidden_states_mask=torch.ones(BATCH, setting.length, dtype=torch.bool),
        timestep=setting.floats(1e-3),
        img_shapes=[(1, setting.side, setting.side)] * BATCH,
    )


def _qwen_controlnet(setting: Setting) -> Inputs:
    samples = setting.noises(NUM_CONTROLS, BATCH, setting.side**2, 64)
    return _qwen(setting) | dict(controlnet_block_samples=samples)


def variants() -> Iterator[Variant]:
    common: dict[str, Any] = dict(
        patch_size=1,
        in_channels=4,
        num_layers=NUM_BLOCKS,
        num_single_layers=NUM_BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    flux = common | dict(pooled_projection_dim=32, guidance_embeds=True)
    for name, call in (("Flux", _flux), ("FluxControlNet", _flux_controlnet)):
        yield Variant(name, diffusers.FluxTransformer2DModel, flux, TWO_LISTS, call)
    yield Variant(
        name="Chroma",
        kind=diffusers.ChromaTransformer2DModel,
        config=common | dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        lists=JOINED,
        call=_chroma,
    )
    bria = common | dict(pooled_projection_dim=None, attention_head_dim=8, axes_dims_rope=(0, 4, 4))
    yield Variant("Bria", diffusers.BriaTransformer2DModel, bria, TWO_LISTS, _bria)
    yield Variant(
        name="BriaFibo",
        kind=diffusers.BriaFiboTransformer2DModel,
        config=bria | dict(in_channels=48, joint_attention_dim=64, text_encoder_dim=32),
        lists=JOINED,
        call=_fibo,
    )
    yield Variant(
        name="Flux2",
        kind=diffusers.Flux2Transformer2DModel,
        config=common | dict(timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4)),
        lists=JOINED,
        call=_flux2,
    )
    qwen = dict(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=NUM_BLOCKS,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    for name, call in (("QwenImage", _qwen), ("QwenImageControlNet", _qwen_controlnet)):
        yield Variant(name, diffusers.QwenImageTransformer2DModel, qwen, {"transformer_blocks": DUAL}, call)
