"""HiDream, Z-Image and other image transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor
from tests.zoo.variant import BATCH, IMAGE_FIRST, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

PADDED = 32  # ZImage pads image and text to a multiple of this.


def _hidream(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        encoder_hidden_states_t5=setting.noise(BATCH, setting.length, 8),
        encoder_hidden_states_llama3=setting.noise(2 * NUM_BLOCKS, BATCH, setting.length, 4),
        pooled_embeds=setting.noise(BATCH, 8),
        timesteps=setting.integers(),
    )


def _z_image_sizes(setting: Setting) -> tuple[int, int]:
    """Side of the latents and number of text tokens, such that different sizes also differ after padding."""
    return (8, 12, 24)[setting.size], (7, 40)[setting.text]


def _z_image(setting: Setting) -> Inputs:
    side, text = _z_image_sizes(setting)
    return dict(
        x=setting.noises(BATCH, 16, 1, side, side),
        cap_feats=setting.noises(BATCH, text, 16),
        t=setting.floats(1e-3),
    )


def _z_image_controlnet(setting: Setting) -> Inputs:
    side, text = _z_image_sizes(setting)
    tokens = sum(-(-length // PADDED) * PADDED for length in ((side // 2) ** 2, text))
    samples = setting.noises(2, BATCH, tokens, 32)
    # Residuals are added after these blocks.
    return _z_image(setting) | dict(controlnet_block_samples=dict(zip((0, 2), samples, strict=True)))


def _joy_image(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 16, 1, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        timestep=setting.floats(),
    )


def _nucleus(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, setting.side**2, 16),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_hidden_states_mask=torch.ones(BATCH, setting.length, dtype=torch.long),
        timestep=setting.floats(1e-3),
        img_shapes=[(1, setting.side, setting.side)] * BATCH,
    )


def _ernie(setting: Setting) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, 4, setting.side, setting.side),
        timestep=setting.floats(),
        text_bth=setting.noise(BATCH, setting.length, 24),
        text_lens=torch.tensor([setting.length, setting.length - 2]),
    )


def variants() -> Iterator[Variant]:
    # The experts are chosen as in training, or with NumPy as in the released models.
    for name, experts, is_forced in (("HiDream", 2, True), ("HiDreamInfer", 4, False)):
        yield Variant(
            name=name,
            kind=diffusers.HiDreamImageTransformer2DModel,
            config=dict(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=NUM_BLOCKS,
                num_single_layers=NUM_BLOCKS,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_channels=[8, 4],
                text_emb_dim=8,
                num_routed_experts=experts,
                num_activated_experts=2,
                axes_dims_rope=(4, 2, 2),
                max_resolution=(32, 32),
                llama_layers=tuple(range(2 * NUM_BLOCKS)),
                force_inference_output=is_forced,
            ),
            lists={"double_stream_blocks": IMAGE_FIRST, "single_stream_blocks": SINGLE},
            call=_hidream,
            times=("timesteps",),
            functor=HiDreamPatchFunctor,
            image_last=False,
        )
    z_image: dict[str, Any] = dict(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=NUM_BLOCKS,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name, call in (("ZImage", _z_image), ("ZImageControlNet", _z_image_controlnet)):
        yield Variant(
            name=name,
            kind=diffusers.ZImageTransformer2DModel,
            config=z_image,
            lists={"layers": ("x",)},
            call=call,
            latents=("x",),
            times=("t",),
            needs_call=True,
        )
    yield Variant(
        name="JoyImageEdit",
        kind=diffusers.JoyImageEditTransformer3DModel,
        config=dict(
            patch_size=[1, 2, 2],
            in_channels=16,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            num_layers=NUM_BLOCKS,
            rope_dim_list=[4, 6, 6],
            theta=256,
        ),
        lists={"double_blocks": IMAGE_FIRST},
        call=_joy_image,
    )
    yield Variant(
        name="NucleusMoE",
        kind=diffusers.NucleusMoEImageTransformer2DModel,
        config=dict(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=NUM_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            moe_enabled=False,
            capacity_factors=[8.0] * NUM_BLOCKS,
        ),
        lists={"transformer_blocks": SINGLE},
        call=_nucleus,
    )
    yield Variant(
        name="ErnieImage",
        kind=diffusers.ErnieImageTransformer2DModel,
        config=dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=NUM_BLOCKS,
            ffn_hidden_size=48,
            in_channels=4,
            out_channels=4,
            text_in_dim=24,
            rope_axes_dim=(8, 4, 4),
        ),
        lists={"layers": ("x",)},
        call=_ernie,
    )
