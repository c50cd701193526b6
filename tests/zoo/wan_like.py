"""Wan and similar ones: video tokens with cross-attention to the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

FRAMES = 2
LISTS = {"blocks": SINGLE}


def _wan(setting: Setting, channels: int = 4, text_width: int = 16) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, channels, FRAMES, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, text_width),
        timestep=setting.integers(),
    )


def _image_to_video(setting: Setting) -> Inputs:
    return _wan(setting) | dict(encoder_hidden_states_image=setting.noise(BATCH, 5, 16))


def _time_per_token(setting: Setting) -> Inputs:
    """Wan 2.2 passes one timestep per token, [B, N], in float32."""
    return _wan(setting) | dict(timestep=torch.full((BATCH, FRAMES * setting.side**2), setting.timestep))


def _vace(setting: Setting) -> Inputs:
    control = setting.noise(BATCH, 48, FRAMES, 2 * setting.side, 2 * setting.side)
    return _wan(setting, channels=16, text_width=32) | dict(control_hidden_states=control)


def _any_flow(setting: Setting) -> Inputs:
    side = 2 * setting.side
    times = setting.floats()[:, None].repeat(1, FRAMES)
    return dict(
        hidden_states=setting.noise(BATCH, FRAMES, 4, side, side),
        timestep=times,
        r_timestep=times / 2,
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
    )


def _animate(setting: Setting) -> Inputs:
    side = (16, 20, 24)[setting.size]
    return dict(
        hidden_states=setting.noise(1, 12, 21, side, side),
        timestep=setting.integers(1),
        encoder_hidden_states=setting.noise(1, setting.length, 16),
        encoder_hidden_states_image=setting.noise(1, 12, 16),
        pose_hidden_states=setting.noise(1, 4, 20, side, side),
        face_pixel_values=setting.noise(1, 3, 77, 16, 16),
    )


def variants() -> Iterator[Variant]:
    common: dict[str, Any] = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=NUM_BLOCKS,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    wan = common | dict(qk_norm="rms_norm_across_heads")
    kind = diffusers.WanTransformer3DModel
    yield Variant("Wan", kind, wan, LISTS, _wan)
    yield Variant("WanI2V", kind, wan | dict(added_kv_proj_dim=24, image_dim=16), LISTS, _image_to_video)
    yield Variant("Wan22TI2V", kind, wan, LISTS, _time_per_token)
    yield Variant(
        name="ChronoEdit",
        kind=diffusers.ChronoEditTransformer3DModel,
        config=wan | dict(image_dim=None, added_kv_proj_dim=None, rope_temporal_skip_len=8, rope_max_seq_len=64),
        lists=LISTS,
        call=_wan,
    )
    yield Variant(
        name="WanVACE",
        kind=diffusers.WanVACETransformer3DModel,
        config=wan | dict(in_channels=16, out_channels=16, text_dim=32, vace_layers=[0, 2], vace_in_channels=48),
        lists=LISTS,
        call=_vace,
    )
    yield Variant(
        name="AnyFlow",
        kind=diffusers.AnyFlowTransformer3DModel,
        config=common | dict(gate_value=0.25, deltatime_type="r"),
        lists=LISTS,
        call=_any_flow,
        times=("timestep", "r_timestep"),
    )
    yield Variant(
        name="WanAnimate",
        kind=diffusers.WanAnimateTransformer3DModel,
        config=wan
        | dict(
            in_channels=12,
            latent_channels=4,
            image_dim=16,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lists=LISTS,
        call=_animate,
    )
