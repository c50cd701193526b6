"""Lumina, OmniGen and the transformers of older pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import torch

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant, noise

TRANSFORMER_BLOCKS = {"transformer_blocks": SINGLE}
LAYERS = {"layers": SINGLE}


def _lumina2(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        timestep=setting.floats(1e-3),
        encoder_attention_mask=torch.ones(BATCH, setting.length, dtype=torch.bool),
    )


def _lumina_next(setting: Setting) -> Inputs:
    inputs = _lumina2(setting)
    del inputs["encoder_attention_mask"]
    return inputs | dict(
        encoder_mask=torch.ones(BATCH, setting.length),
        image_rotary_emb=torch.polar(torch.ones(384, 384, 4), noise(384, 384, 4)),
        cross_attention_kwargs={},
    )


def _omnigen(setting: Setting) -> Inputs:
    """A prompt of token ids, the timestep and the image in one sequence."""
    side, text = 2 * setting.side, setting.length + 17
    tokens = text + 1 + setting.side**2
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=setting.floats(1e-3),
        input_ids=torch.full((BATCH, text), 3),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(BATCH, tokens, tokens),
        position_ids=torch.arange(tokens)[None].repeat(BATCH, 1),
    )


def _prior(setting: Setting) -> Inputs:
    """The model fixes the sizes: one embedding of an image, one of a text, and the tokens of the text."""
    return dict(
        hidden_states=setting.noise(BATCH, 8),
        timestep=torch.tensor(int(setting.timestep)),
        proj_embedding=setting.noise(BATCH, 8),
        encoder_hidden_states=setting.noise(BATCH, 7, 8),
    )


def _amused(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        input_ids=torch.zeros(BATCH, side, side, dtype=torch.int64),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        pooled_text_emb=setting.noise(BATCH, 32),
        micro_conds=torch.ones(BATCH, 5, dtype=setting.dtype),
    )


def _unet_part(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 16, setting.side, setting.side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 12),
    )


def variants() -> Iterator[Variant]:
    lumina = dict(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=NUM_BLOCKS,
        num_attention_heads=3,
        num_kv_heads=1,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
    )
    yield Variant(
        name="Lumina2",
        kind=diffusers.Lumina2Transformer2DModel,
        config=lumina
        | dict(
            num_refiner_layers=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32
        ),
        lists=LAYERS,
        call=_lumina2,
        timestep_input="model",
    )
    yield Variant(
        name="LuminaNext",
        kind=diffusers.LuminaNextDiT2DModel,
        config=lumina | dict(multiple_of=16, learn_sigma=False, qk_norm=True, cross_attention_dim=32),
        lists=LAYERS,
        call=_lumina_next,
    )
    yield Variant(
        name="OmniGen",
        kind=diffusers.OmniGenTransformer2DModel,
        config=dict(
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            num_layers=NUM_BLOCKS,
            pad_token_id=0,
            vocab_size=1000,
            in_channels=4,
            time_step_dim=4,
            rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
        ),
        lists=LAYERS,
        call=_omnigen,
        timestep_input="model",
    )
    yield Variant(
        name="Prior",
        kind=diffusers.PriorTransformer,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=NUM_BLOCKS,
            embedding_dim=8,
            num_embeddings=7,
            additional_embeddings=4,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_prior,
    )
    yield Variant(
        name="UVit2D_Amused",
        kind=diffusers.UVit2DModel,
        config=dict(
            hidden_size=32,
            use_bias=False,
            hidden_dropout=0.0,
            cond_embed_dim=32,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=32,
            vocab_size=32,
            codebook_size=32,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=1,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=1,
            attention_dropout=0.0,
            intermediate_size=32,
            layer_norm_eps=1e-6,
            ln_elementwise_affine=True,
            sample_size=8,
        ),
        lists={"transformer_layers": SINGLE},
        call=_amused,
        latents=("input_ids",),
        times=(),
        timestep_input="none",
    )
    yield Variant(
        name="Transformer2D",
        kind=diffusers.Transformer2DModel,
        config=dict(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            num_layers=NUM_BLOCKS,
            norm_num_groups=4,
            cross_attention_dim=12,
        ),
        lists=TRANSFORMER_BLOCKS,
        call=_unet_part,
        times=(),
        timestep_input="none",
    )
