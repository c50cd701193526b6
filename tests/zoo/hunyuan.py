"""Hunyuan's transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from cachedit_fx.cache_factory.patch_functors import HunyuanImagePatchFunctor
from tests.zoo.variant import BATCH, IMAGE_FIRST, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant, noise

FRAMES = 2
TWO_LISTS = {"transformer_blocks": IMAGE_FIRST, "single_transformer_blocks": IMAGE_FIRST}


def _video(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, setting.side, setting.side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        pooled_projections=setting.noise(BATCH, 8),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        guidance=torch.full((BATCH,), 6000.0).to(setting.dtype),
    )


def _framepack(setting: Setting) -> Inputs:
    side, history = setting.side, 2
    return dict(
        hidden_states=setting.noise(1, 4, 3, side, side),
        timestep=setting.integers(1),
        encoder_hidden_states=setting.noise(1, setting.length, 16),
        pooled_projections=setting.noise(1, 8),
        encoder_attention_mask=torch.ones(1, setting.length),
        guidance=torch.full((1,), 6000),
        image_embeds=setting.noise(1, 12, 16),
        indices_latents=torch.ones(3),
        latents_clean=setting.noise(1, 4, history, side, side),
        indices_latents_clean=torch.ones(history),
        latents_history_2x=setting.noise(1, 4, history, side, side),
        indices_latents_history_2x=torch.ones(history),
        latents_history_4x=setting.noise(1, 4, 4 * history, side, side),
        indices_latents_history_4x=torch.ones(4 * history),
    )


def _video15(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, setting.side, setting.side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        encoder_hidden_states_2=setting.noise(BATCH, 4, 8),
        encoder_attention_mask_2=torch.ones(BATCH, 4),
        image_embeds=torch.zeros(BATCH, 3, 12, dtype=setting.dtype),
    )


def _image(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, setting.side, setting.side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        encoder_hidden_states_2=setting.noise(BATCH, 5, 12),
        encoder_attention_mask_2=torch.ones(BATCH, 5),
    )


def _dit(setting: Setting) -> Inputs:
    side = 2 * setting.side
    sizes = torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]] * BATCH, dtype=setting.dtype)
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, 4, 8),
        text_embedding_mask=torch.ones(BATCH, 4),
        encoder_hidden_states_t5=setting.noise(BATCH, 4, 8, seed=2),
        text_embedding_mask_t5=torch.ones(BATCH, 4),
        image_meta_size=sizes,
        style=torch.zeros(BATCH, dtype=torch.int64),
        image_rotary_emb=(noise(setting.side**2, 8), noise(setting.side**2, 8, seed=1)),
    )


def variants() -> Iterator[Variant]:
    common: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, num_layers=NUM_BLOCKS, num_refiner_layers=1
    )
    video = common | dict(
        attention_head_dim=10,
        num_single_layers=NUM_BLOCKS,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
    )
    yield Variant("HunyuanVideo", diffusers.HunyuanVideoTransformer3DModel, video, TWO_LISTS, _video)
    yield Variant(
        name="HunyuanVideoFramepack",
        kind=diffusers.HunyuanVideoFramepackTransformer3DModel,
        config=video | dict(patch_size=2, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        lists=TWO_LISTS,
        call=_framepack,
        needs_capture=True,
        refused=((2, 1),),
    )
    yield Variant(
        name="HunyuanVideo15",
        kind=diffusers.HunyuanVideo15Transformer3DModel,
        config=common
        | dict(
            attention_head_dim=8,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        lists={"transformer_blocks": IMAGE_FIRST},
        call=_video15,
        timestep_input="model",
        needs_capture=True,
    )
    yield Variant(
        name="HunyuanImage",
        kind=diffusers.HunyuanImageTransformer2DModel,
        config=common
        | dict(
            attention_head_dim=8,
            num_single_layers=NUM_BLOCKS,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=12,
            rope_axes_dim=(4, 4),
        ),
        lists=TWO_LISTS,
        call=_image,
        functor=HunyuanImagePatchFunctor,
    )
    yield Variant(
        name="HunyuanDiT",
        kind=diffusers.HunyuanDiT2DModel,
        config=dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2 * NUM_BLOCKS,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            hidden_size=16,
            text_len=4,
            text_len_t5=4,
            activation_fn="gelu-approximate",
        ),
        lists={"blocks": SINGLE},
        call=_dit,
        cuts=((1, 2),),  # The skip of block 1 leads from the blocks that can be skipped to those that always run.
    )
