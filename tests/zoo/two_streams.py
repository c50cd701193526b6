"""AuraFlow, FLUX.3, LongCat and others: image tokens and text tokens in streams of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.zoo.variant import BATCH, DUAL, IMAGE_FIRST, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

NUM_REFERENCES = 9  # Tokens of a reference image.


def _grid(height: int, width: int, modality: float, start: int = 0) -> Tensor:
    """Positions of image tokens as pipelines build them, [height * width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, modality), rows + start, columns + start], dim=-1).flatten(0, 1).float()


def _line(length: int) -> Tensor:
    """Positions of text tokens, [length, 3]."""
    return torch.stack([torch.zeros(length), torch.arange(length), torch.arange(length)], dim=-1)


def _aura_flow(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        timestep=setting.floats(1e-3),
    )


def _positioned(setting: Setting, start: int = 0) -> Inputs:
    return dict(
        hidden_states=setting.noise(BATCH, setting.side**2, 4),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 32),
        timestep=setting.floats(1e-3),
        txt_ids=_line(setting.length),
        img_ids=_grid(setting.side, setting.side, 1, start),
    )


def _longcat(setting: Setting) -> Inputs:
    return _positioned(setting, start=512) | dict(guidance=None)


def _flux3(setting: Setting) -> Inputs:
    one, side, tokens = torch.arange(1), torch.arange(setting.side), torch.arange(setting.length)
    return _positioned(setting) | dict(
        txt_ids=torch.cartesian_prod(one, one, one, tokens),
        img_ids=torch.cartesian_prod(one, side, side, one),
    )


def _flux3_edit(setting: Setting) -> Inputs:
    """With a reference image, and as a step-distilled model, which gets the timestep it jumps to."""
    one, side = torch.arange(1), torch.arange(3)
    return _flux3(setting) | dict(
        image_cond_hidden_states=setting.noise(BATCH, NUM_REFERENCES, 4),
        image_cond_ids=torch.cartesian_prod(one + 10, side, side, one),
        target_timestep=setting.floats(1e-3) - 0.1,
    )


def _joy_image_plus(setting: Setting) -> Inputs:
    tokens = setting.side**2 + NUM_REFERENCES
    return dict(
        hidden_states=setting.noise(BATCH, tokens, 16, 1, 2, 2),
        timestep=setting.floats(),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        encoder_hidden_states_mask=torch.ones(BATCH, setting.length),
        shape_list=[[(1, setting.side, setting.side), (1, 3, 3)]] * BATCH,
    )


def variants() -> Iterator[Variant]:
    common: dict[str, Any] = dict(
        in_channels=4,
        num_layers=NUM_BLOCKS,
        num_single_layers=NUM_BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
    )
    yield Variant(
        name="AuraFlow",
        kind=diffusers.AuraFlowTransformer2DModel,
        config=dict(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=NUM_BLOCKS,
            num_single_dit_layers=NUM_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        lists={"joint_transformer_blocks": DUAL, "single_transformer_blocks": SINGLE},
        call=_aura_flow,
    )
    two_lists = {"transformer_blocks": DUAL, "single_transformer_blocks": DUAL}
    flux = common | dict(patch_size=1, axes_dims_rope=(4, 4, 8))
    yield Variant(
        name="LongCatImage",
        kind=diffusers.LongCatImageTransformer2DModel,
        config=flux | dict(pooled_projection_dim=32),
        lists=two_lists,
        call=_longcat,
    )
    yield Variant(
        name="OvisImage",
        kind=diffusers.OvisImageTransformer2DModel,
        config=flux | dict(out_channels=4),
        lists=two_lists,
        call=_positioned,
    )
    # The text runs through blocks of its own before it meets the image; they are no part of the chain.
    flux3 = common | dict(cond_in_channels=4, axes_dims_rope=(4, 4, 4, 4))
    for name, call, is_distilled in (("Flux3", _flux3, False), ("Flux3Edit", _flux3_edit, True)):
        yield Variant(
            name=name,
            kind=diffusers.Flux3Transformer2DModel,
            config=flux3 | dict(flow_map=is_distilled),
            lists={"mode_blocks.image": SINGLE, "single_transformer_blocks": DUAL},
            call=call,
            times=("timestep", "target_timestep") if is_distilled else ("timestep",),
            # With a reference image, the image stream is longer in the second list, which does not replay for Bn > 0.
            refused=((2, 1),) if is_distilled else (),
            image_last=False,
        )
    yield Variant(
        name="JoyImageEditPlus",
        kind=diffusers.JoyImageEditPlusTransformer3DModel,
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
        call=_joy_image_plus,
    )
