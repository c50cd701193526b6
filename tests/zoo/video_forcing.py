"""Video transformers that generate a video chunk by chunk, each from those before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

FRAMES = 2


def _sky_reels(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        timestep=setting.integers(),
    )


def _diffusion_forcing(setting: Setting) -> Inputs:
    """One timestep per frame, [1, F]: the second frame is noisier, as with `ar_step` > 0."""
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(1, 4, FRAMES, side, side),
        encoder_hidden_states=setting.noise(1, setting.length, 16),
        timestep=torch.tensor([[setting.timestep - 50, setting.timestep]]).to(torch.int64),
        enable_diffusion_forcing=True,
        fps=[1],
    )


def _helios(setting: Setting) -> Inputs:
    """One chunk of frames after those of the history, which is in three resolutions."""
    side = 2 * setting.side
    first, long, mid, short, frames = torch.arange(1 + 4 + 2 + 1 + FRAMES).split([1, 4, 2, 1, FRAMES])
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        timestep=setting.integers(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        indices_hidden_states=frames[None],
        indices_latents_history_short=torch.cat([first, short])[None],
        indices_latents_history_mid=mid[None],
        indices_latents_history_long=long[None],
        latents_history_short=setting.noise(BATCH, 4, 2, side, side, seed=1),
        latents_history_mid=setting.noise(BATCH, 4, 2, side, side, seed=2),
        latents_history_long=setting.noise(BATCH, 4, 4, side, side),
    )


def _any_flow(setting: Setting) -> Inputs:
    """The second chunk of frames, which attends to the keys and values of the first one."""
    side, tokens = 2 * setting.side, setting.side**2
    times = setting.floats()[:, None]
    caches = {
        block: dict(
            full_cache=setting.noise(2, BATCH, 2, 3 * tokens, 12, seed=block),
            compressed_cache=setting.noise(2, BATCH, 2, tokens // 4, 12, seed=block),
        )
        for block in range(NUM_BLOCKS)
    }
    return dict(
        hidden_states=setting.noise(BATCH, 1, 4, side, side),
        timestep=times,
        r_timestep=times / 2,
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        attention_kwargs=None,
        chunk_partition=[1, 1],
        kv_cache=caches,
        kv_cache_flag=dict(
            num_cached_chunks=1,
            is_cache_step=False,
            num_cached_full_tokens=tokens,
            num_cached_compressed_tokens=0,
        ),
    )


def variants() -> Iterator[Variant]:
    sky_reels: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=NUM_BLOCKS,
        rope_max_seq_len=32,
    )
    kind, lists = diffusers.SkyReelsV2Transformer3DModel, {"blocks": SINGLE}
    yield Variant("SkyReelsV2", kind, sky_reels, lists, _sky_reels)
    forcing = dict(inject_sample_info=True, num_frame_per_block=2)
    yield Variant("SkyReelsV2DF", kind, sky_reels | forcing, lists, _diffusion_forcing)
    yield Variant(
        name="Helios",
        kind=diffusers.HeliosTransformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            ffn_dim=32,
            num_layers=NUM_BLOCKS,
            rope_dim=(4, 4, 4),
        ),
        lists=lists,
        call=_helios,
    )
    yield Variant(
        name="AnyFlowFAR",
        kind=diffusers.AnyFlowFARTransformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            ffn_dim=32,
            num_layers=NUM_BLOCKS,
            rope_max_seq_len=32,
            chunk_partition=(1, 1, 1),
        ),
        lists=lists,
        call=_any_flow,
        times=("timestep", "r_timestep"),
    )
