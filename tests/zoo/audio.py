"""Audio transformers."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant, noise

TRANSFORMER_BLOCKS = {"transformer_blocks": SINGLE}


def _tokens(setting: Setting) -> int:
    """Audio tokens."""
    return (16, 24, 32)[setting.size]


def _stable_audio(setting: Setting) -> Inputs:
    tokens = _tokens(setting)
    return dict(
        hidden_states=setting.noise(BATCH, 4, tokens),
        timestep=setting.floats(1e-3, count=1),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        global_hidden_states=setting.noise(BATCH, 1, 24),
        rotary_embedding=(noise(tokens + 1, 4), noise(tokens + 1, 4, seed=1)),
    )


def _stable_audio3(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 8, _tokens(setting)),
        timestep=setting.floats(1e-3),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        global_hidden_states=setting.noise(BATCH, 12),
    )


def _longcat(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, _tokens(setting), 8),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        encoder_attention_mask=torch.ones(BATCH, setting.length, dtype=torch.bool),
        attention_mask=torch.ones(BATCH, _tokens(setting), dtype=torch.bool),
        timestep=setting.floats(1e-3),
    )


def _music(setting: Setting) -> Inputs:
    """The condition has as many frames as the audio."""
    tokens = _tokens(setting) + 8
    return dict(
        hidden_states=setting.noise(BATCH, 8, tokens),
        encoder_hidden_states=setting.noise(BATCH, tokens, 16),
        timestep=setting.floats(1e-3),
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="StableAudio",
        kind=diffusers.StableAudioDiTModel,
        config=dict(
            sample_size=32,
            in_channels=4,
            num_layers=NUM_BLOCKS,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=24,
            cross_attention_input_dim=16,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_stable_audio,
    )
    yield Variant(
        name="StableAudio3",
        kind=diffusers.StableAudio3DiTModel,
        config=dict(
            io_channels=8,
            patch_size=1,
            embed_dim=32,
            depth=NUM_BLOCKS,
            num_heads=4,
            cond_token_dim=16,
            global_cond_dim=12,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            use_differential_attention=False,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_stable_audio3,
    )
    yield Variant(
        name="LongCatAudioDiT",
        kind=diffusers.LongCatAudioDiTTransformer,
        config=dict(
            dit_dim=64,
            dit_depth=NUM_BLOCKS,
            dit_heads=4,
            dit_text_dim=32,
            latent_dim=8,
            text_conv=False,
        ),
        lists={"blocks": SINGLE},
        call=_longcat,
    )
    yield Variant(
        name="MiniMaxMusic3",
        kind=diffusers.MiniMaxMusic3Transformer1DModel,
        config=dict(
            in_channels=8,
            condition_dim=16,
            num_layers=NUM_BLOCKS,
            num_attention_heads=2,
            attention_head_dim=8,
            ff_inner_dim=32,
            rotary_dim=4,
            fourier_embedding_dim=8,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_music,
    )
