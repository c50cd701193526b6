"""Transformers that generate music."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant


def _frames(setting: Setting) -> int:
    """Latent frames of the music."""
    return (16, 24, 32)[setting.size]


def _ace_step(setting: Setting) -> Inputs:
    """Without mean flow, the reference timestep is the timestep."""
    time = setting.floats(1e-3)
    return dict(
        hidden_states=setting.noise(BATCH, _frames(setting), 4),
        timestep=time,
        timestep_r=time,
        encoder_hidden_states=setting.noise(BATCH, setting.length, 24),
        context_latents=setting.noise(BATCH, _frames(setting), 8),
        attention_kwargs=None,
    )


def _t5_film(setting: Setting) -> Inputs:
    """The pipeline generates one segment of the music at a time, from its notes and the segment before it."""
    frames, length = _frames(setting), setting.length
    return dict(
        encodings_and_masks=[
            (setting.noise(1, length, 32), torch.arange(length)[None] < length - 2),
            (setting.noise(1, frames, 32), torch.ones(1, frames, dtype=torch.bool)),
        ],
        decoder_input_tokens=setting.noise(1, frames, 8),
        decoder_noise_time=torch.full((1,), setting.timestep) / 1000,
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="AceStep",
        kind=diffusers.AceStepTransformer1DModel,
        config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=2,
            encoder_hidden_size=24,
        ),
        lists={"layers": SINGLE},
        call=_ace_step,
        times=("timestep", "timestep_r"),
    )
    yield Variant(
        name="T5Film",
        kind=diffusers.T5FilmDecoder,
        config=dict(
            input_dims=8,
            targets_length=32,
            d_model=32,
            num_layers=NUM_BLOCKS,
            num_heads=4,
            d_kv=8,
            d_ff=48,
        ),
        lists={"decoders": SINGLE},
        call=_t5_film,
        latents=("decoder_input_tokens",),
        times=("decoder_noise_time",),
    )
