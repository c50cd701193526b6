"""Stable Diffusion 3, and the older DiT, PixArt and Sana."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, DUAL, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

NUM_CONTROLS = 2  # Number of residuals that a ControlNet adds between blocks.
LISTS = {"transformer_blocks": SINGLE}


def _sd3(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, setting.side, setting.side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        pooled_projections=setting.noise(BATCH, 64),
        timestep=setting.floats().float(),
    )


def _sd3_controlnet(setting: Setting) -> Inputs:
    samples = setting.noises(NUM_CONTROLS, BATCH, setting.side**2, 32)
    return _sd3(setting) | dict(block_controlnet_hidden_states=samples)


def _pixart(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=setting.integers(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        added_cond_kwargs={"aspect_ratio": None, "resolution": None},
    )


def _dit(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=setting.integers(),
        class_labels=torch.tensor([1, 2]),
    )


def _sana(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, setting.side, setting.side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        timestep=setting.floats(),
    )


def _sana_controlnet(setting: Setting) -> Inputs:
    samples = tuple(setting.noises(NUM_CONTROLS, BATCH, setting.side**2, 8))
    return _sana(setting) | dict(controlnet_block_samples=samples)


def variants() -> Iterator[Variant]:
    sd3: dict[str, Any] = dict(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=NUM_BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=96,
    )
    kind, dual = diffusers.SD3Transformer2DModel, {"transformer_blocks": DUAL}
    yield Variant("SD3", kind, sd3, dual, _sd3)
    yield Variant("SD35", kind, sd3 | dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"), dual, _sd3)
    yield Variant("SD3ControlNet", kind, sd3, dual, _sd3_controlnet)
    dit: dict[str, Any] = dict(
        sample_size=8,
        num_layers=NUM_BLOCKS,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
    )
    yield Variant("DiT", diffusers.DiTTransformer2DModel, dit | dict(norm_type="ada_norm_zero"), LISTS, _dit)
    yield Variant(
        name="PixArt",
        kind=diffusers.PixArtTransformer2DModel,
        config=dit
        | dict(
            cross_attention_dim=8,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
            caption_channels=8,
        ),
        lists=LISTS,
        call=_pixart,
    )
    sana = dict(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=NUM_BLOCKS,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    for name, call in (("Sana", _sana), ("SanaControlNet", _sana_controlnet)):
        yield Variant(name, diffusers.SanaTransformer2DModel, sana, LISTS, call)
