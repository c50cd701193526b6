"""The transformer classes of diffusers that `doctor` lists as not cached, and their reasons."""

from __future__ import annotations

import diffusers
import pytest
import torch

import cachedit_fx
from cachedit_fx import Backend, CacheConfig
from tests.zoo import protein
from tests.zoo.variant_reference import tensors_of


def test_a_stream_that_only_some_blocks_update_is_reported_and_the_outputs_are_those_of_the_model(caplog):
    (variant,) = protein.variants()
    model, call = variant.build(), variant.inputs()
    with torch.no_grad():
        expected = model(**call)
        found = torch.compile(model, backend=Backend(CacheConfig(inner_backend="eager")))(**call)
    torch.testing.assert_close(tensors_of(found), tensors_of(expected), rtol=0, atol=0)
    assert "runs without caching" in caplog.text and "stream-count" in caplog.text
    assert "no output of block 1 has the shape of hidden_pairs" in caplog.text


@pytest.mark.parametrize(
    ("kind", "heads"),
    [(diffusers.UNet3DConditionModel, {"attention_head_dim": 8}), (diffusers.I2VGenXLUNet, {"num_attention_heads": 2})],
)
def test_every_temporal_transformer_of_a_unet_has_a_single_block(kind: type, heads: dict[str, int]):
    unet = kind(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        layers_per_block=1,
        **heads,
    )
    counts = [len(m.transformer_blocks) for m in unet.modules() if isinstance(m, diffusers.TransformerTemporalModel)]
    assert counts and set(counts) == {1}


def test_a_token_decoder_computes_every_call():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = diffusers.MiniMaxMusic3RVQDepthDecoder(
            hidden_size=16, num_layers=4, num_attention_heads=2, intermediate_size=24, audio_vocab_size=8
        ).eval()
        calls = [torch.randn(2, tokens, 16) for _ in range(2) for tokens in (2, 3, 4)]
    with torch.no_grad():
        expected = [decoder(call) for call in calls]
        cachedit_fx.enable_cache(decoder, max_warmup_steps=1, residual_diff_threshold=1.0, inner_backend="eager")
        found = [decoder(call) for call in calls]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    cachedit_fx.disable_cache(decoder)
