"""Pipelines of diffusers with tiny random weights, for examples and tests that download nothing: `tiny_pipeline`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachedit_fx.errors import ConfigError, did_you_mean, listed, missing
from cachedit_fx.testing.tiny_components import (
    PROMPT_TOKENS,
    SIDE,
    build_transformer,
    clip_encoder,
    image_vae,
    qwen_encoder,
    smooth_in_time,
    t5_encoder,
    tokenizer,
    video_vae,
)

__all__ = ["tiny_pipeline"]


@dataclass(frozen=True)
class PipelineKind:
    """What `tiny_pipeline` builds under one name. Classes are named, since diffusers may be absent.

    Attributes:
        pipeline: The class of the pipeline.
        transformer: The class of its transformers.
        config: Their configuration, in addition to what `build_transformer` sets.
        components: Builds the text encoders, the tokenizers and the VAE.
        scheduler: The class of the scheduler, and its configuration.
        transformers: The components that hold a transformer.
        others: Other parameters of the pipeline's class.
        defaults: Defaults of a call that differ from those of the pipeline's class.
        attributes: Attributes of the pipeline that differ from those of its class.
    """

    pipeline: str
    transformer: str
    config: dict[str, Any]
    components: Callable[[], dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})
    transformers: tuple[str, ...] = ("transformer",)
    others: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def tiny_pipeline(name: str, *, num_blocks: int = 4, seed: int = 0) -> Any:
    """A pipeline of diffusers with tiny random weights, built without a download.

    It is complete: `pipe(prompt="a cat", num_inference_steps=8)` returns an image, or a video of 5 frames, of 64 x 64
    pixels. The text encoders, the transformers, the scheduler and the VAE are of the classes of the published pipeline;
    the tokenizers split a prompt into bytes. A call takes less than a second on a CPU. The images are noise. The
    transformers depend on the timestep as smoothly as trained ones, so that the cache reuses steps.

    Args:
        name: The pipeline.

            - `"flux"`: `FluxPipeline`. Its transformer takes the guidance as an input, so there is one call per step.
            - `"qwen"`: `QwenImagePipeline` with true guidance, two calls per step (`true_cfg_scale`, and
              `negative_prompt=" "` by default).
            - `"wan"`: `WanPipeline` with guidance, two calls per step.
            - `"wan2.2"`: `WanPipeline` with two transformers, of which the first runs the steps of high noise.
        num_blocks: The number of blocks in each block list.
        seed: The seed of the weights. Those of equal arguments are equal.

    Returns:
        A pipeline in float32 on the CPU. Its class is a subclass of the one of diffusers, of the same name, whose
        `__call__` has smaller defaults (`height`, `width`, `num_frames`, `max_sequence_length`).

    Raises:
        ConfigError: The name is unknown, `num_blocks` is less than 1, or diffusers or transformers is not installed.
    """
    if name not in KINDS:
        raise ConfigError(
            f"cachedit_fx: name must be one of {listed(map(repr, KINDS))}, got {name!r}.{did_you_mean(name, KINDS)}"
        )
    if num_blocks < 1:
        raise ConfigError(f"cachedit_fx: num_blocks must be an int >= 1, got {num_blocks!r}")
    try:
        import diffusers
        import transformers  # noqa: F401 - The text encoders are imported from it.
    except ImportError as error:
        raise missing(error.name or "diffusers", "tiny_pipeline", "diffusers") from error
    kind = KINDS[name]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        parts = {part: _transformer(kind, num_blocks) for part in kind.transformers} | kind.components()
    scheduler, config = kind.scheduler
    pipeline = _with_defaults(
        getattr(diffusers, kind.pipeline), {"height": 8 * SIDE, "width": 8 * SIDE, **kind.defaults}
    )
    pipe = pipeline(scheduler=getattr(diffusers, scheduler)(**config), **parts, **kind.others)
    for attribute, value in kind.attributes.items():
        setattr(pipe, attribute, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformer(kind: PipelineKind, num_blocks: int) -> torch.nn.Module:
    import diffusers

    transformer = build_transformer(getattr(diffusers, kind.transformer), kind.config, num_blocks)
    smooth_in_time(transformer)
    return transformer


def _with_defaults(pipeline: type[Any], defaults: dict[str, Any]) -> type[Any]:
    """A subclass of the same name, whose `__call__` has these defaults."""
    called = pipeline.__call__
    signature = inspect.signature(called)

    @functools.wraps(called)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        return called(self, *args, **{name: value for name, value in defaults.items() if name not in given}, **kwargs)

    changed = [
        parameter.replace(default=defaults.get(parameter.name, parameter.default))
        for parameter in signature.parameters.values()
    ]
    call.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
    return type(pipeline.__name__, (pipeline,), {"__call__": call, "__doc__": pipeline.__doc__})


def _flux_components() -> dict[str, Any]:
    return dict(
        tokenizer=tokenizer(),
        text_encoder=clip_encoder(),
        tokenizer_2=tokenizer(),
        text_encoder_2=t5_encoder(),
        vae=image_vae(),
    )


def _qwen_components() -> dict[str, Any]:
    import diffusers

    return dict(tokenizer=tokenizer(), text_encoder=qwen_encoder(), vae=video_vae(diffusers.AutoencoderKLQwenImage))


def _wan_components() -> dict[str, Any]:
    import diffusers

    return dict(
        tokenizer=tokenizer(), text_encoder=t5_encoder(multilingual=True), vae=video_vae(diffusers.AutoencoderKLWan)
    )


_WAN = PipelineKind(
    "WanPipeline",
    "WanTransformer3DModel",
    dict(patch_size=(1, 2, 2), freq_dim=256, ffn_dim=64, cross_attn_norm=True, rope_max_seq_len=32),
    _wan_components,
    scheduler=(
        "UniPCMultistepScheduler",
        dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
    defaults=dict(num_frames=5, max_sequence_length=PROMPT_TOKENS),
)

KINDS: dict[str, PipelineKind] = {
    "flux": PipelineKind(
        "FluxPipeline",
        "FluxTransformer2DModel",
        dict(in_channels=64, out_channels=None, patch_size=1, guidance_embeds=True, axes_dims_rope=(4, 4, 8)),
        _flux_components,
        defaults=dict(max_sequence_length=PROMPT_TOKENS),
    ),
    "qwen": PipelineKind(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        dict(in_channels=16, axes_dims_rope=(8, 4, 4)),
        _qwen_components,
        defaults=dict(negative_prompt=" ", max_sequence_length=PROMPT_TOKENS),
        # The template around a prompt consists of more bytes than a tiny encoder should run for.
        attributes=dict(prompt_template_encode="{}", prompt_template_encode_start_idx=0),
    ),
    "wan": _WAN,
    # Above this share of the timesteps, which is about half of the steps, the first transformer runs.
    "wan2.2": replace(_WAN, transformers=("transformer", "transformer_2"), others=dict(boundary_ratio=0.8)),
}
"""The pipelines by name."""
