"""Video transformers in which text and video attend to each other."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch

from tests.zoo.variant import BATCH, IMAGE_FIRST, NUM_BLOCKS, Inputs, Setting, Variant

FRAMES = 2


def _easy_animate(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
    )


def _motif(setting: Setting) -> Inputs:
    """Noisy latents, the latents of the first frame and a mask, in one tensor."""
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 9, FRAMES, side, side),
        timestep=setting.floats().float(),
        attention_kwargs=None,
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
    )


def variants() -> Iterator[Variant]:
    yield Variant(
        name="EasyAnimate",
        kind=diffusers.EasyAnimateTransformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            time_embed_dim=8,
            text_embed_dim=16,
            add_norm_text_encoder=True,
            num_layers=NUM_BLOCKS,
            mmdit_layers=NUM_BLOCKS,
        ),
        lists={"transformer_blocks": IMAGE_FIRST},
        call=_easy_animate,
    )
    yield Variant(
        name="MotifVideo",
        kind=diffusers.MotifVideoTransformer3DModel,
        config=dict(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=NUM_BLOCKS,
            num_single_layers=NUM_BLOCKS,
            mlp_ratio=2.0,
            text_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
            enable_text_cross_attention_single=True,
        ),
        lists={"transformer_blocks": IMAGE_FIRST, "single_transformer_blocks": IMAGE_FIRST},
        call=_motif,
    )
