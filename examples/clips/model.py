"""The clip model: a small Wan, in the `WanPipeline` of diffusers.

    pipeline = build_pipeline()
    frames = pipeline(prompt="red square moves left, blue circle falls", **call_arguments(seed=0)).frames

A clip has 8 frames of 16x16 pixels. The latents are the pixels, scaled to a variance of about one: `PixelVAE` has the
interface of `AutoencoderKLWan` that `WanPipeline` uses, and compresses nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from captions import BLURRY
from diffusers import ConfigMixin, ModelMixin, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from draw import FRAMES, SIDE
from safetensors.torch import load_file
from text import TEXT_TOKENS, TEXT_WIDTH, build_text_encoder, build_tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

if TYPE_CHECKING:
    from diffusers import WanPipeline

WEIGHTS = Path(__file__).with_name("weights.safetensors")
FLOW_SHIFT = 3.0  # As Wan's for 480p.
# Mean and standard deviation of the red, green and blue of drawn clips, which are in [-1, 1].
LATENTS_MEAN = (-0.49, -0.50, -0.55)
LATENTS_STD = (0.39, 0.35, 0.30)


class PixelVAE(ModelMixin, ConfigMixin):
    """Takes the place of `AutoencoderKLWan`: the latents are the pixels. `WanPipeline` scales them by mean and std."""

    @register_to_config
    def __init__(
        self,
        z_dim: int = 3,
        latents_mean: tuple[float, ...] = LATENTS_MEAN,
        latents_std: tuple[float, ...] = LATENTS_STD,
        temperal_downsample: tuple[bool, ...] = (),  # The spelling of diffusers.
        scale_factor_temporal: int = 1,
        scale_factor_spatial: int = 1,
    ) -> None:
        super().__init__()
        # WanPipeline reads dtype and device from the first parameter or buffer.
        self.register_buffer("placeholder", torch.zeros(()), persistent=False)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Returns the clips of unscaled latents, [B, 3, 8, 16, 16]."""
        return DecoderOutput(sample=z) if return_dict else (z,)


def latents_of(clips: Tensor) -> Tensor:
    """Returns the latents of clips, both [B, 3, 8, 16, 16]. `WanPipeline` does the inverse before it decodes."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    return (clips - mean) / std


def build_transformer() -> WanTransformer3DModel:
    """Returns an untrained Wan transformer of width 160 with 8 blocks. A token is 2 frames of 4x4 pixels."""
    return WanTransformer3DModel(
        patch_size=(2, 4, 4),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=480,
        num_layers=8,
        rope_max_seq_len=32,
    )


def load_transformer(path: Path = WEIGHTS) -> WanTransformer3DModel:
    """Returns the trained transformer in float32, for inference. The file contains the weights in float16."""
    return _load(build_transformer(), "transformer.", path)


def load_text_encoder(path: Path = WEIGHTS) -> UMT5EncoderModel:
    """Returns the trained text encoder in float32, for inference."""
    return _load(build_text_encoder(), "text_encoder.", path)


def _load(module: Any, prefix: str, path: Path) -> Any:
    state = {name: value.float() for name, value in load_file(path).items()}
    module.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return module.eval().requires_grad_(False)


def build_pipeline(transformer: nn.Module | None = None, text_encoder: nn.Module | None = None) -> WanPipeline:
    """Returns a `WanPipeline` of diffusers with Wan's scheduler.

    Args:
        transformer: The transformer, which may be compiled; None for the trained one.
        text_encoder: The text encoder; None for the trained one.
    """
    # Imported here because the import loads image processors, which warn about missing packages that are not used.
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    from diffusers import WanPipeline

    logging.getLogger(WanPipeline.__module__).addFilter(_is_not_about_frames)
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=load_text_encoder() if text_encoder is None else text_encoder,
        vae=PixelVAE(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        transformer=load_transformer() if transformer is None else transformer,
    )


def _is_not_about_frames(record: logging.LogRecord) -> bool:
    """Whether a message is not the warning that the number of frames is rounded; see `call_arguments`."""
    return "num_frames" not in str(record.msg)


def call_arguments(seed: int, steps: int = 20, guidance: float = 3.0) -> dict[str, Any]:
    """Returns the arguments of a call of the pipeline, except the prompt, which may be a list."""
    return {
        "negative_prompt": BLURRY,
        "height": SIDE,
        "width": SIDE,
        # WanPipeline rounds it to a multiple of the temporal factor plus 1. With the factor 1, this adds a frame.
        "num_frames": FRAMES - 1,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": TEXT_TOKENS,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    }


def clips_of(frames: Tensor) -> Tensor:
    """Converts the frames of the pipeline, [B, 8, 3, 16, 16] in [0, 1], to clips, [B, 3, 8, 16, 16] in [-1, 1]."""
    return 2 * frames.transpose(1, 2) - 1
