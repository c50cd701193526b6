"""Pipelines of diffusers around the transformers of `work.py`, and the arguments of a call.

The pipelines have neither text encoders nor a VAE: the prompts are embeddings, and the outputs are latents. Their
loops, guidance, schedulers and calls of `cache_context` are those of diffusers.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.work import Work, build, latents_of, prompt_of

Mark = tuple[float, float]  # Wall time and CPU time of the process, in seconds.
_FLUX_SCHEDULE = dict(use_dynamic_shifting=True, shift=3.0)  # As in FLUX.1-dev.
_WAN_SCHEDULE = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)  # As in Wan at 480p.


@dataclass(frozen=True)
class PipelineKind:
    """A class of pipelines.

    Attributes:
        pipeline: The class.
        scheduler: Creates the scheduler.
        arguments: (work, inputs of the transformer by guidance branch) -> arguments of a call of the pipeline.
    """

    pipeline: type[diffusers.DiffusionPipeline]
    scheduler: Callable[[], Any]
    arguments: Callable[[Work, dict[str, dict[str, Any]]], dict[str, Any]]


def transformers_of(work: Work) -> list[str]:
    """Returns the names of the transformers in the pipeline."""
    return ["transformer", "transformer_2"][: len(work.steps)]


def build_pipeline(work: Work, *, is_reference: bool = False) -> Any:
    """Returns a new pipeline, with the same weights every time.

    Args:
        is_reference: Whether its class is a subclass, with the `__call__` that the class had when it was imported.
    """
    kind = PIPELINES[work.kind]
    models = {name: build(work, seed=seed) for seed, name in enumerate(transformers_of(work))}
    scheduler = kind.scheduler()
    others: dict[str, Any] = {"scheduler": scheduler}
    if work.switch is not None:
        scheduler.set_timesteps(work.num_steps)
        before, after = scheduler.timesteps[work.switch - 1 : work.switch + 1].tolist()
        others["boundary_ratio"] = (before + after) / 2 / scheduler.config.num_train_timesteps
    cls = _REFERENCES[work.kind] if is_reference else kind.pipeline
    parameters = inspect.signature(kind.pipeline).parameters.values()
    absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    pipe: Any = cls(**(absent | models | others))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(work: Work, seed: int) -> dict[str, Any]:
    """Returns the arguments of a call of the pipeline, with new tensors every time."""
    kind = PIPELINES[work.kind]
    return dict(
        num_inference_steps=work.num_steps,
        latents=latents_of(work, seed),
        output_type="latent",
        return_dict=False,
        **kind.arguments(work, prompt_of(work, seed).inputs),
    )


def module_of(transformer: Any) -> nn.Module:
    """Returns the transformer itself, without what `torch.compile` puts around it."""
    module: nn.Module = getattr(transformer, "_orig_mod", transformer)
    return module


def relative_difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other| over all elements (L2, in float32)."""
    return float((one.float() - other.float()).norm() / other.float().norm())


class Recorder:
    """Runs the pipeline once, and records when each step begins and when its last transformer call has returned.

    The marks are set by `callback_on_step_end` and by the scheduler. Nothing is put around the transformers, so that
    they are called as in any use of the pipeline.

    Args:
        before_step: Called with the number of a step before it begins.
        after_step: Called with the number of a step when it has ended.

    Attributes:
        latents: The latents after every step.
    """

    def __init__(
        self,
        work: Work,
        pipe: Any,
        before_step: Callable[[int], None] = lambda _: None,
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._work, self._pipe, self._before, self._after = work, pipe, before_step, after_step
        self._begins: list[Mark] = []
        self._ends: list[Mark] = []
        self.latents: list[Tensor] = []

    def run(self, seed: int) -> dict[str, Any]:
        """Runs a generation; returns its seconds, and those of every step: its transformer calls and the guidance.

        Step 0 includes what the pipeline does before the loop.
        """
        pipe, arguments = self._pipe, call_arguments(self._work, seed)
        scheduler_step = pipe.scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self._ends.append(_now())
            return scheduler_step(*args, **kwargs)

        pipe.scheduler.step = step
        self._before(0)
        self._begins.append(_now())
        try:
            with torch.no_grad():
                pipe(callback_on_step_end=self._end_step, **arguments)
        finally:
            del pipe.scheduler.step
        end = _now()
        if len(self._ends) != self._work.num_steps or not self.latents[-1].isfinite().all():
            raise RuntimeError(f"{len(self._ends)} steps of {self._work.num_steps}, or latents that are not finite")
        steps = [_seconds(begin, end) for begin, end in zip(self._begins, self._ends, strict=False)]
        return {**_seconds(self._begins[0], end), "steps": steps}

    def _end_step(self, _pipe: Any, number: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.latents.append(kwargs["latents"])
        self._after(number)
        self._before(number + 1)
        self._begins.append(_now())
        return {}


def _now() -> Mark:
    return time.perf_counter(), time.process_time()


def _seconds(begin: Mark, end: Mark) -> dict[str, float]:
    return {"wall": end[0] - begin[0], "cpu": end[1] - begin[1]}


def _flux_arguments(work: Work, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (prompt,) = inputs.values()
    height, width = work.grid
    return dict(
        prompt_embeds=prompt["encoder_hidden_states"],
        pooled_prompt_embeds=prompt["pooled_projections"],
        guidance_scale=3.5,
        height=16 * height,
        width=16 * width,
    )


def _qwen_arguments(work: Work, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    prompt, negative = (entry["encoder_hidden_states"] for entry in inputs.values())
    height, width = work.grid
    return dict(
        prompt_embeds=prompt,
        prompt_embeds_mask=torch.ones(prompt.shape[:2], dtype=torch.int64),
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=torch.ones(negative.shape[:2], dtype=torch.int64),
        true_cfg_scale=work.guidance,
        height=16 * height,
        width=16 * width,
    )


def _wan_arguments(work: Work, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    prompt, negative = (entry["encoder_hidden_states"] for entry in inputs.values())
    frames, height, width = work.grid
    return dict(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        negative_prompt=None,
        guidance_scale=work.guidance,
        num_frames=4 * (frames - 1) + 1,
        height=16 * height,
        width=16 * width,
    )


PIPELINES = {
    "flux": PipelineKind(
        diffusers.FluxPipeline,
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(**_FLUX_SCHEDULE),
        _flux_arguments,
    ),
    "qwen": PipelineKind(
        diffusers.QwenImagePipeline,
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _qwen_arguments,
    ),
    "wan": PipelineKind(
        diffusers.WanPipeline, lambda: diffusers.UniPCMultistepScheduler(**_WAN_SCHEDULE), _wan_arguments
    ),
}

# cache-dit replaces `__call__` in the class of a pipeline. The reference runs without it.
_REFERENCES: dict[str, Any] = {
    name: type(kind.pipeline.__name__, (kind.pipeline,), {"__call__": kind.pipeline.__call__})
    for name, kind in PIPELINES.items()
}
