"""Real diffusers pipelines around tiny random transformers, for whole generations that end in latents.

    tiny = PIPELINES["wan"]
    pipe = tiny.build()
    latents = tiny.run(pipe, seed=1, num_steps=8)

The pipelines are those of diffusers, with their loops, guidance, schedulers and calls of `cache_context`. They have
neither a VAE nor a text encoder: prompts are given as embeddings, and the outputs are latents. The latents are 8x8, the
transformers at most 32 wide, and the batch size is 1. `cachedit_fx.testing.tiny_pipeline` makes complete pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cachedit_fx.testing.tiny_components import SIDE, TEXT_WIDTH, build_transformer
from cachedit_fx.testing.tiny_pipelines import KINDS

NUM_BLOCKS = 4  # In every block list.
TEXT = 7  # Tokens of a prompt; no pipeline here has the same number of image tokens.
NEGATIVE_TEXT = 5  # Tokens of a negative prompt, if its length may differ from that of the prompt.
FRAMES = 2  # Frames of the latents of a video.
GUIDANCE = 3.0
LLAMA_LAYERS = 4  # Hidden states of Llama that HiDream's blocks choose from.


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline, with everything that a test needs to run it.

    Attributes:
        name: Key in `PIPELINES`.
        kind: The pipeline's class.
        transformer_kind: The class of its transformers.
        config: Their configuration, in addition to what `build_transformer` sets.
        inputs: seed -> arguments of a call, in new tensors; `arguments` adds those that all pipelines have in common.
        guidance_branches: Labels that the pipeline gives to `cache_context` in each step of a call with `arguments`, in
            order. Empty for a pipeline that gives none.
        scheduler: Creates the scheduler.
        transformers: Components that hold a diffusion transformer.
        others: Creates the other components; everything else that the class requires is None.
    """

    name: str
    kind: type[DiffusionPipeline]
    transformer_kind: type[nn.Module]
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    guidance_branches: tuple[str, ...] = ()
    scheduler: Callable[[], Any] = diffusers.FlowMatchEulerDiscreteScheduler
    transformers: tuple[str, ...] = ("transformer",)
    others: Callable[[], dict[str, Any]] = dict

    def build(self, num_blocks: int = NUM_BLOCKS) -> DiffusionPipeline:
        """A new pipeline, always with the same weights for the same number of blocks."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            transformers = {name: self._transformer(num_blocks) for name in self.transformers}
        parameters = inspect.signature(self.kind).parameters.values()
        absent = {p.name: None for p in parameters if p.default is p.empty}
        pipe = self.kind(**(absent | self.others() | transformers | {"scheduler": self.scheduler()}))
        pipe.default_sample_size = SIDE  # HiDream scales any height and width up to this area.
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _transformer(self, num_blocks: int) -> nn.Module:
        config = self.config
        if "llama_layers" in inspect.signature(self.transformer_kind).parameters:  # HiDream: a layer for every block.
            config = config | {"llama_layers": [i % LLAMA_LAYERS for i in range(2 * num_blocks)]}
        return build_transformer(self.transformer_kind, config, num_blocks)

    def arguments(self, seed: int = 1) -> dict[str, Any]:
        """Keyword arguments of a call, besides `num_inference_steps`; new tensors every time."""
        common = dict(height=8 * SIDE, width=8 * SIDE, output_type="latent", return_dict=False)
        return common | self.inputs(seed)

    def run(self, pipe: DiffusionPipeline, seed: int = 1, num_steps: int = 8, **overrides: Any) -> Tensor:
        """The latents after the last of `num_steps` steps, in the shape that the pipeline works with."""
        return pipe(num_inference_steps=num_steps, **(self.arguments(seed) | overrides))[0]


def _noise(seed: int, *shape: int) -> Tensor:
    """Unit Gaussian values, the same for the same shape and seed."""
    return torch.randn(*shape, generator=_generator(1000 * seed + sum(shape)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _image(seed: int, channels: int = 4, side: int = SIDE) -> Tensor:
    """Latents of an image, [1, channels, side, side]."""
    return _noise(seed, 1, channels, side, side)


def _packed(seed: int, channels: int) -> Tensor:
    """Latents of an image as tokens of 2x2 latent pixels, [1, tokens, channels]."""
    return _noise(seed, 1, SIDE**2 // 4, channels)


def _video(seed: int, compression: int = 4) -> dict[str, Any]:
    """Latents of a video, [1, 4, FRAMES, SIDE, SIDE], and the number of frames that `compression` makes of them."""
    return dict(latents=_noise(seed, 1, 4, FRAMES, SIDE, SIDE), num_frames=compression * (FRAMES - 1) + 1)


def _embeddings(seed: int, tokens: int = TEXT) -> Tensor:
    """[1, tokens, TEXT_WIDTH]."""
    return _noise(seed, 1, tokens, TEXT_WIDTH)


def _padding_mask(padding: int, tokens: int = TEXT) -> Tensor:
    """int64 [1, tokens], zeros for the last `padding` tokens."""
    return (torch.arange(tokens) < tokens - padding).long()[None]


def _both(seed: int, prompt: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The prompt of `seed` and, with the prefix "negative_", that of a negative seed."""
    return prompt(seed) | {f"negative_{name}": value for name, value in prompt(-1 - seed).items()}


def _prompts(seed: int) -> dict[str, Any]:
    """A prompt and a negative prompt of the same length, and the guidance that uses both."""
    prompts = _both(seed, lambda seed: dict(prompt_embeds=_embeddings(seed)))
    # If the default of `negative_prompt` is "", the pipeline refuses embeddings in addition.
    return prompts | dict(negative_prompt=None, guidance_scale=GUIDANCE)


def _masked_prompts(seed: int, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """As `_prompts`, with masks of `dtype` that give the negative prompt fewer tokens."""
    masks = dict(
        prompt_attention_mask=_padding_mask(1).to(dtype), negative_prompt_attention_mask=_padding_mask(3).to(dtype)
    )
    return _prompts(seed) | masks


def _distilled(seed: int) -> dict[str, Any]:
    """A prompt for a transformer that takes guidance as an input: one call per step."""
    return dict(prompt_embeds=_embeddings(seed), pooled_prompt_embeds=_noise(seed, 1, 32), guidance_scale=3.5)


def _qwen_inputs(seed: int) -> dict[str, Any]:
    return dict(
        prompt_embeds=_embeddings(seed),
        prompt_embeds_mask=_padding_mask(0),
        negative_prompt_embeds=_embeddings(-1 - seed, NEGATIVE_TEXT),
        negative_prompt_embeds_mask=_padding_mask(0, NEGATIVE_TEXT),
        true_cfg_scale=GUIDANCE,
        latents=_packed(seed, 16),
    )


def _zimage_inputs(seed: int) -> dict[str, Any]:
    return dict(
        prompt_embeds=[*_embeddings(seed)],  # A list, with one tensor for each image of the batch.
        negative_prompt_embeds=[*_embeddings(-1 - seed, NEGATIVE_TEXT)],
        guidance_scale=GUIDANCE,
        latents=_image(seed),
    )


def _hidream_prompt(seed: int) -> dict[str, Any]:
    return dict(
        prompt_embeds_t5=_embeddings(seed),
        prompt_embeds_llama3=_noise(seed, LLAMA_LAYERS, 1, TEXT, TEXT_WIDTH),
        pooled_prompt_embeds=_noise(seed, 1, 8),
    )


def _hunyuan_image_prompt(seed: int) -> dict[str, Any]:
    return dict(
        prompt_embeds=_embeddings(seed),
        prompt_embeds_mask=_padding_mask(1 if seed >= 0 else 3),  # Negative seeds belong to negative prompts.
        prompt_embeds_2=_noise(seed, 1, 3, 12),  # The text to be rendered in the image.
        prompt_embeds_mask_2=_padding_mask(0, 3),
    )


# The published PixArt and Allegro predict the noise; with a random transformer the latents would grow a hundredfold.
_V_PREDICTION = dict(prediction_type="v_prediction", timestep_spacing="trailing")
_FLOW = KINDS["wan"].scheduler[1]
_FLOW_UNIPC = partial(diffusers.UniPCMultistepScheduler, **_FLOW)
_FLUX, _QWEN, _WAN = (KINDS[name].config for name in ("flux", "qwen", "wan"))

_TABLE = (
    TinyPipeline(
        "flux",
        diffusers.FluxPipeline,
        diffusers.FluxTransformer2DModel,
        _FLUX,
        lambda seed: _distilled(seed) | dict(latents=_packed(seed, 64)),
        guidance_branches=("cond",),
    ),
    TinyPipeline(
        "flux_img2img",  # Runs the fraction `strength` of the steps; an image of 16 channels counts as encoded.
        diffusers.FluxImg2ImgPipeline,
        diffusers.FluxTransformer2DModel,
        _FLUX,
        lambda seed: _distilled(seed) | dict(image=_image(seed, 16), strength=0.6, generator=_generator(seed)),
    ),
    TinyPipeline(
        "flux2",
        diffusers.Flux2Pipeline,
        diffusers.Flux2Transformer2DModel,
        dict(in_channels=16, patch_size=1, out_channels=None, axes_dims_rope=(4, 4, 4, 4)),
        lambda seed: dict(prompt_embeds=_embeddings(seed), latents=_image(seed, 16, SIDE // 2), guidance_scale=4.0),
    ),
    TinyPipeline(
        "qwen_image",
        diffusers.QwenImagePipeline,
        diffusers.QwenImageTransformer2DModel,
        _QWEN,
        _qwen_inputs,
        guidance_branches=("cond", "uncond"),
    ),
    TinyPipeline(
        "wan",
        diffusers.WanPipeline,
        diffusers.WanTransformer3DModel,
        _WAN,
        lambda seed: _prompts(seed) | _video(seed),
        guidance_branches=("cond", "uncond"),
        scheduler=_FLOW_UNIPC,
    ),
    TinyPipeline(
        "wan22",  # About half of the timesteps are above the boundary, for the first transformer.
        diffusers.WanPipeline,
        diffusers.WanTransformer3DModel,
        _WAN,
        lambda seed: _prompts(seed) | _video(seed),
        guidance_branches=("cond", "uncond"),
        scheduler=_FLOW_UNIPC,
        transformers=("transformer", "transformer_2"),
        others=lambda: KINDS["wan2.2"].others,
    ),
    TinyPipeline(
        "hunyuan_video",
        diffusers.HunyuanVideoPipeline,
        diffusers.HunyuanVideoTransformer3DModel,
        dict(guidance_embeds=True, rope_axes_dim=(4, 4, 8)),
        lambda seed: _distilled(seed) | _video(seed) | dict(prompt_attention_mask=_padding_mask(1)),
        guidance_branches=("cond",),
    ),
    TinyPipeline(
        "ltx",
        diffusers.LTXPipeline,
        diffusers.LTXVideoTransformer3DModel,
        dict(patch_size=1),
        lambda seed: (
            _masked_prompts(seed, torch.bool)
            | _video(seed, compression=8)
            | dict(latents=_noise(seed, 1, FRAMES * SIDE**2, 4), height=32 * SIDE, width=32 * SIDE)
        ),
        guidance_branches=("cond_uncond",),
    ),
    TinyPipeline(
        "cogvideox",
        diffusers.CogVideoXPipeline,
        diffusers.CogVideoXTransformer3DModel,
        dict(sample_width=SIDE, sample_height=SIDE, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True),
        lambda seed: _prompts(seed) | _video(seed) | dict(latents=_noise(seed, 1, FRAMES, 4, SIDE, SIDE)),
        guidance_branches=("cond_uncond",),
        scheduler=partial(diffusers.CogVideoXDDIMScheduler, **_V_PREDICTION),
    ),
    TinyPipeline(
        "sd3",
        diffusers.StableDiffusion3Pipeline,
        diffusers.SD3Transformer2DModel,
        {},
        lambda seed: (
            _prompts(seed)
            | _both(seed, lambda seed: dict(pooled_prompt_embeds=_noise(seed, 1, 32)))
            | dict(latents=_image(seed))
        ),
    ),
    TinyPipeline(
        "chroma",
        diffusers.ChromaPipeline,
        diffusers.ChromaTransformer2DModel,
        dict(
            in_channels=16,
            out_channels=None,
            patch_size=1,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        # The masks of the pipeline are also floats, and are therefore added to the attention scores.
        lambda seed: _masked_prompts(seed, torch.float) | dict(latents=_packed(seed, 16)),
    ),
    TinyPipeline(
        "lumina2",
        diffusers.Lumina2Pipeline,
        diffusers.Lumina2Transformer2DModel,
        dict(hidden_size=32, num_kv_heads=1, multiple_of=2, axes_dim_rope=(8, 4, 4), axes_lens=(128, 32, 32)),
        lambda seed: _masked_prompts(seed) | dict(latents=_image(seed)),
    ),
    TinyPipeline(
        "hidream",  # The experts that run depend on the data, as in the published checkpoints.
        diffusers.HiDreamImagePipeline,
        diffusers.HiDreamImageTransformer2DModel,
        dict(
            caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
            text_emb_dim=8,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(SIDE, SIDE),
        ),
        lambda seed: _both(seed, _hidream_prompt) | dict(latents=_image(seed), guidance_scale=GUIDANCE),
    ),
    TinyPipeline(
        "sana",
        diffusers.SanaPipeline,
        diffusers.SanaTransformer2DModel,
        dict(patch_size=1, num_cross_attention_heads=2, cross_attention_head_dim=16),
        lambda seed: (
            _masked_prompts(seed)
            | dict(latents=_image(seed), height=32 * SIDE, width=32 * SIDE, use_resolution_binning=False)
        ),
        scheduler=partial(diffusers.DPMSolverMultistepScheduler, **_FLOW),
    ),
    TinyPipeline(
        "pixart",
        diffusers.PixArtAlphaPipeline,
        diffusers.PixArtTransformer2DModel,
        dict(out_channels=8),
        lambda seed: _masked_prompts(seed) | dict(latents=_image(seed), use_resolution_binning=False),
        scheduler=partial(diffusers.DPMSolverMultistepScheduler, **_V_PREDICTION),
    ),
    TinyPipeline(
        "auraflow",
        diffusers.AuraFlowPipeline,
        diffusers.AuraFlowTransformer2DModel,
        dict(pos_embed_max_size=64),
        lambda seed: _masked_prompts(seed) | dict(latents=_image(seed)),
    ),
    TinyPipeline(
        "allegro",  # The scheduler adds noise at every step.
        diffusers.AllegroPipeline,
        diffusers.AllegroTransformer3DModel,
        dict(attention_head_dim=12, cross_attention_dim=24, sample_width=SIDE, sample_height=SIDE),
        lambda seed: _masked_prompts(seed) | _video(seed) | dict(generator=_generator(seed)),
        scheduler=partial(diffusers.EulerAncestralDiscreteScheduler, **_V_PREDICTION),
    ),
    TinyPipeline(
        "mochi",
        diffusers.MochiPipeline,
        diffusers.MochiTransformer3DModel,
        dict(max_sequence_length=TEXT),
        lambda seed: _masked_prompts(seed, torch.bool) | _video(seed, compression=6),
        guidance_branches=("cond_uncond",),
        scheduler=partial(diffusers.FlowMatchEulerDiscreteScheduler, invert_sigmas=True),
    ),
    TinyPipeline(
        "zimage",
        diffusers.ZImagePipeline,
        diffusers.ZImageTransformer2DModel,
        dict(dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        _zimage_inputs,
    ),
    TinyPipeline(
        "cogview4",
        diffusers.CogView4Pipeline,
        diffusers.CogView4Transformer2DModel,
        dict(condition_dim=4),
        lambda seed: _prompts(seed) | dict(latents=_image(seed)),
        guidance_branches=("cond", "uncond"),
    ),
    TinyPipeline(
        "hunyuan_image",
        diffusers.HunyuanImagePipeline,
        diffusers.HunyuanImageTransformer2DModel,
        dict(patch_size=(2, 2), text_embed_2_dim=12, rope_axes_dim=(8, 8)),
        lambda seed: _both(seed, _hunyuan_image_prompt) | dict(latents=_image(seed), height=32 * SIDE, width=32 * SIDE),
        guidance_branches=("pred_cond", "pred_uncond"),
        # Has the guidance scale; `ocr_guider` replaces it for prompts with text to render.
        others=lambda: dict(
            guider=diffusers.AdaptiveProjectedMixGuidance(), ocr_guider=diffusers.AdaptiveProjectedMixGuidance()
        ),
    ),
)

PIPELINES: dict[str, TinyPipeline] = {tiny.name: tiny for tiny in _TABLE}
