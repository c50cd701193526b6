"""Tiny random components for pipelines of diffusers: transformers, text encoders, tokenizers and VAEs.

Nothing is downloaded. `diffusers` and `transformers` are imported when a component is built.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

SIDE = 8  # Height and width of the latents; with a VAE, an image has 64 x 64 pixels.
TEXT_WIDTH = 16  # Width of the embeddings of a prompt.
POOLED_WIDTH = 32  # Width of the pooled embedding of a prompt.
PROMPT_TOKENS = 16  # Most tokens of a prompt, whose tokens are its bytes.

_BLOCK_COUNTS = ("num_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers", "n_layers")
_SMALL = dict(
    in_channels=4,
    out_channels=4,
    patch_size=2,
    sample_size=SIDE,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=POOLED_WIDTH,
    time_embed_dim=16,
    num_refiner_layers=1,
    joint_attention_dim=TEXT_WIDTH,
    text_embed_dim=TEXT_WIDTH,
    text_dim=TEXT_WIDTH,
    caption_channels=TEXT_WIDTH,
    cap_feat_dim=TEXT_WIDTH,
)
"""What a transformer is configured with, where its class has the parameter and its own configuration lacks it."""

_PAD, _END = "<pad>", "</s>"
_NUM_TOKENS = 2 + 256  # Those two, and every byte.


def build_transformer(kind: type[nn.Module], config: dict[str, Any], num_blocks: int) -> nn.Module:
    """A transformer of a class of diffusers with random weights, in eval mode, with `num_blocks` in each block list."""
    accepted = inspect.signature(kind).parameters
    shared = _SMALL | dict.fromkeys(_BLOCK_COUNTS, num_blocks)
    model = kind(**({name: value for name, value in shared.items() if name in accepted} | config))
    for parameter in model.parameters():
        # Gates and output projections are initialized to zero, and blocks would have no effect.
        if parameter.numel() > 1 and not parameter.any():
            nn.init.normal_(parameter, 0, 0.02)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def smooth_in_time(transformer: nn.Module, period: float = 150.0) -> None:
    """Damps what changes faster than over `period` of the 1000 timesteps in the embeddings of the timestep.

    With random weights, unlike trained ones, neighboring steps would be unrelated, and no step could be reused.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    for module in transformer.modules():
        if isinstance(module, TimestepEmbedding):
            # The inputs are cosines and sines of the timestep times 10000^(-i/n).
            num_frequencies = module.linear_1.in_features // 2
            frequencies = 10000.0 ** (-torch.arange(num_frequencies) / num_frequencies)
            module.linear_1.weight.mul_(torch.exp(-((period * frequencies) ** 2) / 2).repeat(2))


def tokenizer() -> Any:
    """A tokenizer whose tokens are the bytes of a prompt and the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [_PAD, _END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=tokens, pad_token=_PAD, eos_token=_END, model_max_length=PROMPT_TOKENS)


def clip_encoder() -> Any:
    """A CLIP text encoder, for pooled embeddings [B, POOLED_WIDTH]."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=_NUM_TOKENS,
        hidden_size=POOLED_WIDTH,
        intermediate_size=POOLED_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _frozen(transformers.CLIPTextModel, config)


def t5_encoder(*, multilingual: bool = False) -> Any:
    """A T5 encoder, or one of UMT5, for embeddings [B, T, TEXT_WIDTH]."""
    import transformers

    config: dict[str, Any] = dict(
        vocab_size=_NUM_TOKENS, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    if multilingual:
        return _frozen(transformers.UMT5EncoderModel, transformers.UMT5Config(**config))
    return _frozen(transformers.T5EncoderModel, transformers.T5Config(**config))


def qwen_encoder() -> Any:
    """A Qwen2.5-VL, for embeddings [B, T, TEXT_WIDTH]."""
    import transformers

    common: dict[str, Any] = dict(hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH)
    text: dict[str, Any] = dict(
        vocab_size=_NUM_TOKENS,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=dict(rope_type="default", type="default", mrope_section=[1, 1, 2]),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision: dict[str, Any] = dict(depth=1, num_heads=2, out_hidden_size=TEXT_WIDTH)
    config = transformers.Qwen2_5_VLConfig(text_config=common | text, vision_config=common | vision)
    return _frozen(transformers.Qwen2_5_VLForConditionalGeneration, config)


def image_vae() -> Any:
    """The VAE of FLUX: latents of 16 channels, and 8 x 8 pixels for each of them."""
    import diffusers

    return _frozen(
        diffusers.AutoencoderKL,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def video_vae(kind: Any) -> Any:
    """A VAE of `AutoencoderKLWan` or `AutoencoderKLQwenImage`, with latents of 4 channels."""
    return _frozen(
        kind, base_dim=8, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def _frozen(kind: Any, *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **kwargs).eval().requires_grad_(False)
