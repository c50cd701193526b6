"""Other video transformers."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from tests.zoo.variant import BATCH, IMAGE_FIRST, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

FRAMES = 2
AUDIO = 9  # Audio tokens.


def _ltx(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, FRAMES * setting.side**2, 4),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        timestep=setting.floats().float(),
        encoder_attention_mask=torch.ones(BATCH, setting.length, dtype=torch.bool),
        num_frames=FRAMES,
        height=setting.side,
        width=setting.side,
        rope_interpolation_scale=(0.4, 32.0, 32.0),
    )


def _ltx2(setting: Setting) -> Inputs:
    inputs = _ltx(setting) | dict(
        audio_hidden_states=setting.noise(BATCH, AUDIO, 4),
        audio_encoder_hidden_states=setting.noise(BATCH, setting.length, 16, seed=3),
        audio_num_frames=AUDIO,
        fps=25.0,
    )
    del inputs["rope_interpolation_scale"]
    return inputs


def _latte(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, 3, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        timestep=setting.integers(),
        enable_temporal_attentions=True,
    )


def _mochi(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        timestep=setting.floats().float(),
        encoder_attention_mask=torch.ones(BATCH, setting.length, dtype=torch.bool),
    )


def _allegro(setting: Setting) -> Inputs:
    """Rotary tables and positions as AllegroPipeline computes them."""
    side, grid = 2 * setting.side, (setting.side, setting.side)
    *tables, time, height, width = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), grid),
        grid_size=grid,
        temporal_size=FRAMES,
        interpolation_scale=(1.0, 1.0, 1.0),
    )
    places = torch.cartesian_prod(time.long(), height.long(), width.long())
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 8),
        attention_mask=torch.ones(BATCH, FRAMES, side, side),
        encoder_attention_mask=torch.ones(BATCH, setting.length),
        timestep=setting.integers(),
        image_rotary_emb=(tuple(tables), tuple(places.T.reshape(3, 1, -1).contiguous())),
    )


def _cosmos(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, FRAMES, side, side),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        attention_mask=torch.ones(BATCH, setting.length),
        fps=30,
        padding_mask=torch.zeros(1, 1, side, side, dtype=setting.dtype),
    )


def _cosmos3(setting: Setting) -> Inputs:
    """One image after a text in one sequence; there is no batch, and every noisy token has its own timestep."""
    side, text = setting.side, setting.length
    image = torch.arange(text, text + side**2)
    return dict(
        input_ids=torch.arange(text),
        text_indexes=torch.arange(text),
        position_ids=torch.arange(text + side**2).repeat(3, 1),
        und_len=text,
        sequence_length=text + side**2,
        vision_tokens=[setting.noise(1, 2, 1, side, side)],
        vision_token_shapes=[(1, side, side)],
        vision_sequence_indexes=image,
        vision_mse_loss_indexes=image,
        vision_timesteps=torch.full((side**2,), setting.timestep),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


def variants() -> Iterator[Variant]:
    ltx = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=NUM_BLOCKS,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    yield Variant("LTX", diffusers.LTXVideoTransformer3DModel, ltx, {"transformer_blocks": SINGLE}, _ltx)
    yield Variant(
        name="LTX2",
        kind=diffusers.LTX2VideoTransformer3DModel,
        config=ltx
        | dict(
            patch_size=1,
            patch_size_t=1,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            rope_double_precision=False,
        ),
        lists={"transformer_blocks": ("hidden_states", "audio_hidden_states")},
        call=_ltx2,
        latents=("hidden_states", "audio_hidden_states"),
    )
    yield Variant(
        name="Latte",
        kind=diffusers.LatteTransformer3DModel,
        config=dict(
            sample_size=8,
            num_layers=NUM_BLOCKS,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_channels=8,
            in_channels=4,
            cross_attention_dim=8,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=3,
        ),
        lists={"transformer_blocks": SINGLE, "temporal_transformer_blocks": SINGLE},
        call=_latte,
        alternates=True,
    )
    yield Variant(
        name="Mochi",
        kind=diffusers.MochiTransformer3DModel,
        config=dict(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=NUM_BLOCKS,
            pooled_projection_dim=16,
            in_channels=4,
            out_channels=None,
            qk_norm="rms_norm",
            text_embed_dim=16,
            time_embed_dim=4,
            activation_fn="swiglu",
            max_sequence_length=16,
        ),
        lists={"transformer_blocks": IMAGE_FIRST},
        call=_mochi,
        needs_capture=True,
    )
    yield Variant(
        name="Allegro",
        kind=diffusers.AllegroTransformer3DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=NUM_BLOCKS,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=8,
        ),
        lists={"transformer_blocks": SINGLE},
        call=_allegro,
    )
    yield Variant(
        name="Cosmos",
        kind=diffusers.CosmosTransformer3DModel,
        config=dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=NUM_BLOCKS,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,  # True needs torchvision.
            extra_pos_embed_type="learnable",
        ),
        lists={"transformer_blocks": SINGLE},
        call=_cosmos,
    )
    yield Variant(
        name="Cosmos3Omni",
        kind=diffusers.Cosmos3OmniTransformer,
        config=dict(
            head_dim=6,
            hidden_act="relu2",
            hidden_size=12,
            intermediate_size=24,
            latent_channel=2,
            latent_patch_size=1,
            num_attention_heads=2,
            num_hidden_layers=NUM_BLOCKS,
            num_key_value_heads=1,
            patch_latent_dim=2,
            qk_norm_for_text=False,
            rms_norm_eps=1e-5,
            rope_axes_dim=[1, 1, 1],
            rope_theta=1e8,
            vocab_size=32,
        ),
        lists={"layers": ("und_seq", "gen_seq")},
        call=_cosmos3,
        latents=("vision_tokens",),
        times=("vision_timesteps",),
    )
