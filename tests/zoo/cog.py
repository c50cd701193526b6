"""CogVideoX, CogView and similar ones: image and text tokens in one list, with the image returned first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, IMAGE_FIRST, NUM_BLOCKS, Inputs, Setting, Variant, noise

FRAMES = 2
LISTS = {"transformer_blocks": IMAGE_FIRST}


def _video(setting: Setting) -> Inputs:
    """The length of the text is part of the model, because its position embeddings are learned."""
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, FRAMES, 4, side, side),
        encoder_hidden_states=setting.noise(BATCH, 7, 8),
        timestep=setting.integers(),
    )


def _rotary_video(setting: Setting) -> Inputs:
    tokens = FRAMES * setting.side**2
    return _video(setting) | dict(
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        image_rotary_emb=(noise(tokens, 8), noise(tokens, 8, seed=1)),
    )


def _face_video(setting: Setting) -> Inputs:
    face = dict(
        id_vit_hidden=[torch.ones(BATCH, 2, 2, dtype=setting.dtype)], id_cond=torch.ones(BATCH, 2, dtype=setting.dtype)
    )
    return _video(setting) | face


def _view(setting: Setting) -> Inputs:
    side = 2 * setting.side
    pixels = torch.full((BATCH, 2), 8.0 * side, dtype=setting.dtype)
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        original_size=pixels,
        target_size=pixels.clone(),
        crop_coords=torch.zeros(BATCH, 2, dtype=setting.dtype),
        timestep=setting.integers(),
    )


def _glm_image(setting: Setting) -> Inputs:
    side, tokens = 2 * setting.side, setting.side**2
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        prior_token_id=torch.arange(BATCH * tokens).reshape(BATCH, tokens) % 64,
        prior_token_drop=torch.zeros(BATCH, tokens, dtype=torch.bool),
        timestep=setting.integers(),
        target_size=torch.full((BATCH, 2), float(side), dtype=setting.dtype),
        crop_coords=torch.zeros(BATCH, 2, dtype=setting.dtype),
    )


def variants() -> Iterator[Variant]:
    video: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=NUM_BLOCKS,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
    )
    kind = diffusers.CogVideoXTransformer3DModel
    yield Variant("CogVideoX", kind, video | dict(patch_size_t=None), LISTS, _video)
    rotary = dict(patch_size_t=None, use_rotary_positional_embeddings=True)
    yield Variant("CogVideoX5B", kind, video | rotary, LISTS, _rotary_video)
    yield Variant(
        name="ConsisID",
        kind=diffusers.ConsisIDTransformer3DModel,
        config=video
        | dict(
            cross_attn_interval=2,
            is_kps=False,
            is_train_face=True,
            cross_attn_dim_head=1,
            cross_attn_num_heads=1,
            LFE_id_dim=2,
            LFE_vit_dim=2,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=1,
            LFE_output_dim=10,
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        lists=LISTS,
        call=_face_video,
    )
    view: dict[str, Any] = dict(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=NUM_BLOCKS,
        attention_head_dim=4,
        text_embed_dim=8,
        time_embed_dim=8,
    )
    yield Variant(
        name="CogView3Plus",
        kind=diffusers.CogView3PlusTransformer2DModel,
        config=view | dict(num_attention_heads=2, condition_dim=2, pos_embed_max_size=16, sample_size=8),
        lists=LISTS,
        call=_view,
    )
    yield Variant(
        name="CogView4",
        kind=diffusers.CogView4Transformer2DModel,
        config=view | dict(num_attention_heads=4, condition_dim=4),
        lists=LISTS,
        call=_view,
    )
    yield Variant(
        name="GlmImage",
        kind=diffusers.GlmImageTransformer2DModel,
        config=view
        | dict(
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        lists=LISTS,
        call=_glm_image,
        needs_capture=True,
    )
