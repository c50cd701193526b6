"""Krea 2, Ideogram 4 and others: text tokens and image tokens in one stream, or the text read by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import diffusers
import torch
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor

from tests.zoo.variant import BATCH, NUM_BLOCKS, SINGLE, Inputs, Setting, Variant

NUM_TEXT_LAYERS = 3  # Layers of the text encoder whose outputs are passed.
INJECTIONS = (1, 3)  # The blocks of BriaFibo2 that read such an output themselves.


def _positions(setting: Setting, *, text: Tensor, start: int) -> Tensor:
    """Positions of all tokens, [text + image, 3]."""
    rows, columns = torch.meshgrid(torch.arange(setting.side), torch.arange(setting.side), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([text, image + start])


def _krea2(setting: Setting) -> Inputs:
    mask = torch.ones(BATCH, setting.length, dtype=torch.bool)
    mask[1, -2:] = False
    return dict(
        hidden_states=setting.noise(BATCH, setting.side**2, 16),
        encoder_hidden_states=setting.noise(BATCH, setting.length, NUM_TEXT_LAYERS, 16),
        timestep=setting.floats(1e-3),
        position_ids=_positions(setting, text=torch.zeros(setting.length, 3), start=0),
        encoder_attention_mask=mask,
    )


def _ideogram4(setting: Setting) -> Inputs:
    text = torch.arange(setting.length)[:, None].expand(-1, 3)
    indicator = torch.full((BATCH, setting.length + setting.side**2), OUTPUT_IMAGE_INDICATOR)
    indicator[:, : setting.length] = LLM_TOKEN_INDICATOR
    segments = torch.ones_like(indicator)
    # The second prompt is shorter and is padded on the left.
    indicator[1, :2], segments[1, :2] = 0, -1
    tokens = indicator.shape[1]
    return dict(
        hidden_states=setting.noise(BATCH, tokens, 16),
        timestep=1 - setting.floats(1e-3),  # 0 is noise.
        encoder_hidden_states=setting.noise(BATCH, tokens, 24),
        position_ids=_positions(setting, text=text, start=65536).expand(BATCH, -1, -1),
        segment_ids=segments,
        indicator=indicator,
    )


def _fibo2(setting: Setting) -> Inputs:
    side = 2 * setting.side
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=setting.floats(1e-3),
        encoder_hidden_states=setting.noise(BATCH, 1 + len(INJECTIONS), setting.length, 16),
        encoder_attention_mask=None,
        context_latents=None,
    )


def _fibo2_edit(setting: Setting) -> Inputs:
    mask = torch.ones(BATCH, setting.length, dtype=torch.bool)
    mask[1, -3:] = False
    return _fibo2(setting) | dict(encoder_attention_mask=mask, context_latents=setting.noises(1, BATCH, 4, 6, 6))


def _prx(setting: Setting) -> Inputs:
    side = 2 * setting.side
    mask = torch.ones(BATCH, setting.length, dtype=torch.bool)
    mask[1, -2:] = False
    return dict(
        hidden_states=setting.noise(BATCH, 4, side, side),
        timestep=torch.full((BATCH,), setting.timestep * 1e-3),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        attention_mask=mask,
    )


def _qwen21(setting: Setting) -> Inputs:
    """The first step of the pipeline; four image tokens stand for one slot of the text encoder."""
    slots = torch.zeros(BATCH, setting.length + setting.side**2 // 4, dtype=torch.bool)
    slots[:, setting.length :] = True
    return dict(
        hidden_states=setting.noise(BATCH, setting.side**2, 16),
        encoder_hidden_states=setting.noise(BATCH, setting.length, 16),
        timestep=setting.floats(1e-3),
        img_shapes=[[(1, setting.side, setting.side)]] * BATCH,
        img_mask=slots,
        encoder_hidden_states_mask=None,
        kv_cache=QwenImage21KVCache(NUM_BLOCKS),
        kv_cache_mode="extract",
    )


def _qwen21_later(setting: Setting) -> Inputs:
    """The other steps, which read the keys and values of the text from the first one."""
    inputs = _qwen21(setting) | dict(kv_cache_mode="cached")
    for layer in inputs["kv_cache"].layer_caches:
        layer.store(*setting.noises(2, BATCH, setting.length, 2, 16))
    return inputs


def variants() -> Iterator[Variant]:
    yield Variant(
        name="Krea2",
        kind=diffusers.Krea2Transformer2DModel,
        config=dict(
            in_channels=16,
            num_layers=NUM_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=32,
            text_hidden_dim=16,
            num_text_layers=NUM_TEXT_LAYERS,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=24,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        lists={"transformer_blocks": SINGLE},
        call=_krea2,
    )
    yield Variant(
        name="Ideogram4",
        kind=diffusers.Ideogram4Transformer2DModel,
        config=dict(
            in_channels=16,
            num_layers=NUM_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=24,
            mrope_section=(4, 2, 2),
        ),
        lists={"layers": SINGLE},
        call=_ideogram4,
    )
    timestep_input: Literal["graph", "model"]
    for name, call, timestep_input in (("BriaFibo2", _fibo2, "graph"), ("BriaFibo2Edit", _fibo2_edit, "model")):
        yield Variant(
            name=name,
            kind=diffusers.BriaFibo2Transformer2DModel,
            config=dict(
                in_channels=4,
                dim=32,
                n_layers=NUM_BLOCKS,
                n_refiner_layers=1,
                n_heads=2,
                cap_feat_dim=16,
                injection_layer_ids=INJECTIONS,
                perceiver_num_layers=1,
                min_num_gist_tokens=2,
                max_num_gist_tokens=8,
                gist_step=2,
                gist_min_text_len=2,
                gist_max_text_len=16,
                axes_dims=(4, 6, 6),
                axes_lens=(64, 32, 32),
            ),
            lists={"layers": ("x",)},
            call=call,
            timestep_input=timestep_input,
            needs_call=call is _fibo2,
        )
    yield Variant(
        name="PRX",
        kind=diffusers.PRXTransformer2DModel,
        config=dict(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            num_heads=2,
            depth=NUM_BLOCKS,
            axes_dim=[8, 8],
        ),
        lists={"blocks": SINGLE},
        call=_prx,
    )
    for name, call in (("QwenImage21", _qwen21), ("QwenImage21Later", _qwen21_later)):
        yield Variant(
            name=name,
            kind=diffusers.QwenImage21Transformer2DModel,
            config=dict(
                in_channels=16,
                out_channels=16,
                num_layers=NUM_BLOCKS,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=16,
                axes_dims_rope=(4, 6, 6),
            ),
            lists={"transformer_blocks": SINGLE},
            call=call,
            timestep_input="model",
        )
