"""Transformers that generate a video along a camera path, or a video with its sound in one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant, noise

FRAMES = 2
REFINER_WIDTH = 32
TRANSFORMER_BLOCKS = {"transformer_blocks": SINGLE}


def _sana_wm(setting: Setting) -> Inputs:
    """The first frame is given: its timestep is 0. The camera's pose is 16 numbers, its intrinsics are 4."""
    side = setting.side
    pose = torch.eye(4).flatten().repeat(BATCH, FRAMES, 1)
    pose[:, :, 3] = torch.arange(FRAMES) / 10
    intrinsics = torch.tensor([side, side, side / 2, side / 2]).repeat(BATCH, FRAMES, 1)
    time = torch.full((BATCH, 1, FRAMES), setting.timestep)
    time[:, :, 0] = 0
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        timestep=time,
        encoder_hidden_states=setting.noise(BATCH, 1, setting.length, 16),
        data_info={"img_hw": torch.tensor([[32.0 * side, 32.0 * side]])},
        mask=torch.ones(BATCH, setting.length, dtype=torch.int64),
        camera_conditions=torch.cat([pose, intrinsics], dim=-1).to(setting.dtype),
        chunk_plucker=setting.noise(BATCH, 6, FRAMES, side, side),
    )


def _refiner(setting: Setting) -> Inputs:
    """A chunk of two frames, which attends to one frame before all chunks and to the last chunk."""
    per_frame = setting.side**2
    tokens = 2 * per_frame
    cache = SanaWMRefinerKVCache(NUM_BLOCKS)
    for number in range(NUM_BLOCKS):
        layer = cache.get(number)
        layer.store_sink(*setting.noises(2, 1, per_frame, REFINER_WIDTH))
        layer.store_history(*setting.noises(2, 1, tokens, REFINER_WIDTH))
    cache.sink_pe = _rotary(per_frame)
    return dict(
        hidden_states=setting.noise(1, tokens, 4),
        encoder_hidden_states=setting.noise(1, setting.length, 16),
        timestep=torch.full((1, tokens), setting.timestep),
        video_rotary_emb=_rotary(tokens),
        encoder_attention_mask=torch.ones(1, setting.length),
        kv_cache=cache,
        kv_cache_mode="inject",
    )


def _rotary(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = noise(1, tokens, REFINER_WIDTH // 2).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _minimax_h3(setting: Setting) -> Inputs:
    """Text, audio and video in one sequence. Audio and video have schedules of their own, so two timesteps."""
    text, audio, video = setting.length, 6, 2 * setting.side**2
    tokens = torch.arange(text + audio + video)
    is_audio, is_video = (tokens >= text) & (tokens < text + audio), tokens >= text + audio
    return dict(
        hidden_states=setting.noise(1, video, 16),
        audio_hidden_states=setting.noise(1, audio, 6),
        encoder_hidden_states=setting.noise(1, text, 20),
        timestep=torch.tensor([setting.timestep * 1e-3 - 0.05, setting.timestep * 1e-3]),
        timestep_indices=(~is_audio).long(),
        attention_kwargs=None,
        token_tags=torch.where(is_video, 0, torch.where(is_audio, 2, 1)),
        position_ids=torch.stack([tokens, tokens % setting.side, tokens // 2], dim=1).double(),
        video_indices=tokens[is_video],
        audio_indices=tokens[is_audio],
        text_indices=tokens[:text],
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="SanaWM",
        kind=diffusers.SanaWMTransformer3DModel,
        config=dict(
            in_channels=4,
            num_layers=NUM_BLOCKS,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=NUM_BLOCKS,
            linear_head_dim=24,
            chunk_plucker_channels=6,
            chunk_plucker_post_attn_blocks=NUM_BLOCKS,
            caption_channels=16,
        ),
        lists={"blocks": ("x",)},
        call=_sana_wm,
        dtype=torch.float32,  # On a CPU it refuses a camera in bfloat16.
    )
    refiner: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=REFINER_WIDTH,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=NUM_BLOCKS,
        caption_channels=16,
    )
    yield Variant(
        name="SanaWMRefiner",
        kind=diffusers.SanaWMLTX2RefinerTransformer3DModel,
        config=refiner,
        lists=TRANSFORMER_BLOCKS,
        call=_refiner,
    )
    yield Variant(
        name="MiniMaxH3",
        kind=diffusers.MiniMaxH3Transformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=NUM_BLOCKS,
            num_refiner_layers=1,
            ffn_dim=48,
            in_channels=4,
            audio_in_channels=6,
            text_dim=20,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=24,
            rope_freq_dim=2,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_minimax_h3,
        latents=("hidden_states", "audio_hidden_states"),
    )
