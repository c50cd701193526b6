"""What training and generating digits have in common: model, conditioning, packing, pipeline.

An image is one channel of 8x8 pixels in [-1, 1]. It stands where a latent stands in Flux, so that the
`FluxPipeline` of diffusers runs on it unchanged: no text encoder, no autoencoder, `output_type="latent"`.
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
GRID_SIDE = IMAGE_SIDE // 2  # Tokens: a token is a 2x2 patch.
# FluxPipeline takes a size in pixels and divides by 8, the scale of the autoencoder that is not there.
PIPELINE_SIDE = 8 * IMAGE_SIDE
WEIGHTS = Path(__file__).with_name("weights.safetensors")


def build_transformer() -> FluxTransformer2DModel:
    """A Flux transformer of width 128 with 4 dual-stream and 8 single-stream blocks, not yet trained."""
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
    """The trained transformer in float32, for inference. The file holds float16, half the size."""
    transformer = build_transformer()
    transformer.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return transformer.eval().requires_grad_(False)


def build_pipeline(transformer: nn.Module) -> FluxPipeline:
    """The `FluxPipeline` of diffusers around `transformer`, which may be compiled."""
    # Only here: the import pulls in transformers, which training does not need and which warns about
    # image processors that are missing and not used.
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
    """What stands in for the two text embeddings.

    Args:
        digits: Classes, [B], int64.

    Returns:
        Token embeddings, [B, 2, 20], where each token has the one-hot class in ten components of its own,
        and the pooled embedding, [B, 10], the one-hot class. Both float32.
    """
    pooled = one_hot(digits, NUM_CLASSES).float()
    tokens = pooled.new_zeros(len(digits), CONDITIONING_TOKENS, CONDITIONING_TOKENS, NUM_CLASSES)
    for i in range(CONDITIONING_TOKENS):
        tokens[:, i, i] = pooled
    return tokens.flatten(2), pooled


def position_ids() -> tuple[Tensor, Tensor]:
    """Rotary positions as `FluxPipeline` makes them: text, [2, 3], all zero; image, [16, 3], (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(GRID_SIDE), torch.arange(GRID_SIDE), indexing="ij")
    image = torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
    return torch.zeros(CONDITIONING_TOKENS, 3), image.float()


def patchify(images: Tensor) -> Tensor:
    """Images, [B, 8, 8], as tokens, [B, 16, 4], in the order in which `FluxPipeline` packs latents."""
    patches = images.unflatten(2, (GRID_SIDE, 2)).unflatten(1, (GRID_SIDE, 2))
    return patches.permute(0, 1, 3, 2, 4).reshape(-1, GRID_SIDE * GRID_SIDE, 4)


def unpatchify(tokens: Tensor) -> Tensor:
    """Tokens, [B, 16, 4], as images, [B, 8, 8]. The inverse of `patchify`."""
    patches = tokens.reshape(-1, GRID_SIDE, GRID_SIDE, 2, 2)
    return patches.permute(0, 1, 3, 2, 4).reshape(-1, IMAGE_SIDE, IMAGE_SIDE)
