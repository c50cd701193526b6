"""The digit model, its conditioning, the packing of images, and the pipeline, for training and generation.

An image has one channel of 8x8 pixels in [-1, 1]. It takes the place of a latent in Flux, so that the `FluxPipeline` of
diffusers runs on it unchanged: without a text encoder or an autoencoder, and with `output_type="latent"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from diffusers import FluxPipeline

NUM_CLASSES = 10
CONDITIONING_TOKENS = 2
IMAGE_SIDE = 8  # Pixels.
GRID_SIDE = IMAGE_SIDE // 2  # Tokens; a token is a patch of 2x2 pixels.
# FluxPipeline takes a size in pixels and divides it by 8, the scale of the autoencoder, which this pipeline lacks.
PIPELINE_SIDE = 8 * IMAGE_SIDE
WEIGHTS = Path(__file__).with_name("weights.safetensors")


def build_transformer() -> FluxTransformer2DModel:
    """Returns an untrained Flux transformer of width 128 with 4 dual-stream and 8 single-stream blocks."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=CONDITIONING_TOKENS * NUM_CLASSES,
        pooled_projection_dim=NUM_CLASSES,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def load_transformer(path: Path = WEIGHTS) -> FluxTransformer2DModel:
    """Returns the trained transformer in float32, for inference. The file contains the weights in float16."""
    transformer = build_transformer()
    transformer.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return transformer.eval().requires_grad_(False)


def build_pipeline(transformer: nn.Module) -> FluxPipeline:
    """Returns a `FluxPipeline` of diffusers with `transformer`, which may be compiled."""
    # Imported here because the import loads transformers, which training does not need and which warns about missing
    # image processors that are not used.
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def class_conditioning(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the conditioning that replaces the two text embeddings.

    Args:
        digits: Classes, [B], int64.

    Returns:
        Token embeddings, float32 [B, 2, 20], in which each token has the one-hot class in ten components of its own,
        and the pooled embedding, float32 [B, 10], which is the one-hot class.
    """
    pooled = one_hot(digits, NUM_CLASSES).float()
    tokens = pooled.new_zeros(len(digits), CONDITIONING_TOKENS, CONDITIONING_TOKENS, NUM_CLASSES)
    for i in range(CONDITIONING_TOKENS):
        tokens[:, i, i] = pooled
    return tokens.flatten(2), pooled


def position_ids() -> tuple[Tensor, Tensor]:
    """Returns rotary positions like those of `FluxPipeline`, float32.

    Text positions, [2, 3], are zero. Image positions, [16, 3], are (0, row, column).
    """
    row, column = torch.meshgrid(torch.arange(GRID_SIDE), torch.arange(GRID_SIDE), indexing="ij")
    image = torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
    return torch.zeros(CONDITIONING_TOKENS, 3), image.float()


def patchify(images: Tensor) -> Tensor:
    """Converts images, [B, 8, 8], to tokens, [B, 16, 4], in the order in which `FluxPipeline` packs latents."""
    patches = images.unflatten(2, (GRID_SIDE, 2)).unflatten(1, (GRID_SIDE, 2))
    return patches.permute(0, 1, 3, 2, 4).reshape(-1, GRID_SIDE * GRID_SIDE, 4)


def unpatchify(tokens: Tensor) -> Tensor:
    """Converts tokens, [B, 16, 4], to images, [B, 8, 8]. This is the inverse of `patchify`."""
    patches = tokens.reshape(-1, GRID_SIDE, GRID_SIDE, 2, 2)
    return patches.permute(0, 1, 3, 2, 4).reshape(-1, IMAGE_SIDE, IMAGE_SIDE)
