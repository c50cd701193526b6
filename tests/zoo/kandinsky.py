"""Video transformers with cross-attention to the text: Kandinsky and Sana."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

FRAMES = 2
AUDIO = 5  # Audio tokens.


def _kandinsky5(setting: Setting) -> Inputs:
    """Latents with channels last, and the positions of the tokens."""
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, FRAMES, side, side, 9),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        pooled_projections=setting.noise(BATCH, 8),
        timestep=setting.floats(),
        visual_rope_pos=[torch.arange(FRAMES), torch.arange(setting.side), torch.arange(setting.side)],
        text_rope_pos=torch.arange(setting.length),
        scale_factor=(1.0, 2.0, 2.0),
        sparse_params=None,
    )


def _kandinsky6(setting: Setting) -> Inputs:
    """Video and audio, which are denoised together."""
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, FRAMES, side, side, 9),
        audio_hidden_states=setting.noise(BATCH, AUDIO, 4),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        pooled_projections=setting.noise(BATCH, 8),
        timestep=setting.floats().float(),
        visual_rope_pos=(torch.arange(FRAMES), torch.arange(setting.side), torch.arange(setting.side)),
        encoder_attention_mask=None,
        visual_token_type_ids=torch.zeros(BATCH, FRAMES, dtype=torch.int64),
    )


def _kandinsky6_sr(setting: Setting) -> Inputs:
    """Tiles of a video, whose sides are multiples of 8 tokens; there is no text."""
    side = 8 * (1 + setting.size)
    return dict(hidden_states=setting.noise(BATCH, 1, side, side, 9), timestep=setting.floats().float())


def _sana_video(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_attention_mask=torch.ones(BATCH, setting.length, dtype=torch.int64),
        timestep=setting.floats().float(),
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="Kandinsky5",
        kind=diffusers.Kandinsky5Transformer3DModel,
        config=dict(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=2,
            num_visual_blocks=NUM_BLOCKS,
            axes_dims=(4, 4, 4),
            visual_cond=True,
        ),
        lists={"visual_transformer_blocks": ("visual_embed",)},
        call=_kandinsky5,
    )
    yield Variant(
        name="Kandinsky6",
        kind=diffusers.Kandinsky6Transformer3DModel,
        config=dict(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=NUM_BLOCKS,
            axes_dims=(4, 4, 4),
            in_audio_dim=4,
            out_audio_dim=4,
            model_dim_a=12,
            axes_dims_a=(4, 4, 4),
            ff_dim_a=16,
            time_dim_a=16,
            ca_rope=True,
            cross_gates=True,
            fix_modulation=True,
            text_token_padding=True,
            visual_token_type_num_embeddings=2,
        ),
        lists={"visual_transformer_blocks": ("vis", "aud")},
        call=_kandinsky6,
        latents=("hidden_states", "audio_hidden_states"),
    )
    yield Variant(
        name="Kandinsky6SR",
        kind=diffusers.Kandinsky6SRTransformer3DModel,
        config=dict(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=NUM_BLOCKS,
            axes_dims=(4, 6, 6),
        ),
        lists={"visual_transformer_blocks": SINGLE},
        call=_kandinsky6_sr,
    )
    yield Variant(
        name="SanaVideo",
        kind=diffusers.SanaVideoTransformer3DModel,
        config=dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=NUM_BLOCKS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            rope_max_seq_len=32,
        ),
        lists={"transformer_blocks": SINGLE},
        call=_sana_video,
    )
