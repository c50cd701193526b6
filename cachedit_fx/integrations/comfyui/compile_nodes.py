"""The nodes "Compile with cache" and "Cache report", with the attributes by which ComfyUI finds them."""

from __future__ import annotations

from typing import Any

import torch

from cachedit_fx.config.cache_config import DEFAULT_WARMUP_STEPS, CacheConfig
from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.forecasters.forecaster_registry import forecasters
from cachedit_fx.integrations.comfyui.model_cache import cache_of, enable_cache
from cachedit_fx.integrations.comfyui.run_picture import picture_of
from cachedit_fx.runtime.instances import calls_of, records_of
from cachedit_fx.runtime.stats import CacheStats, Summary

_MASKS = {f"mask: {name}": name for name in ("slow", "medium", "fast", "ultra")}
_MODES = ("threshold", *_MASKS, "compile only", "off")
_NO_FORECASTER = "none"
_NEED_TUNING = ("fitted",)  # Forecasters that have no default.
_BACKENDS = ("inductor", "cudagraphs", "eager")


class CompileWithCache:
    """Returns a model that is compiled, and whose blocks are reused at steps where their input has hardly changed."""

    DESCRIPTION = (
        "Compiles the diffusion model, and reuses what its blocks computed at steps where it would hardly change. "
        "Takes the place of TorchCompileModel."
    )
    CATEGORY = "model_patches/cachedit_fx"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compile"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # The name that ComfyUI calls.
        """The inputs by name, each with its type and what its widget needs."""
        names = [_NO_FORECASTER, *(name for name in forecasters() if name not in _NEED_TUNING)]
        return {
            "required": {
                "model": ("MODEL",),
                "mode": (
                    [*_MODES],
                    {
                        "default": "threshold",
                        "tooltip": "threshold: reuse a step if its residual diff is below the threshold. mask: reuse "
                        "fixed steps, from few (slow) to many (ultra). compile only: reuse nothing. off: return the "
                        "model as it is.",
                    },
                ),
                "residual_diff_threshold": (
                    "FLOAT",
                    {"default": _default("residual_diff_threshold"), "min": 0.0, "max": 1.0, "step": 0.01}
                    | {"tooltip": "How far the blocks' input may change, relative to the last computed step."},
                ),
                "warmup_steps": (
                    "INT",
                    {"default": DEFAULT_WARMUP_STEPS, "min": 0, "max": 1000}
                    | {"tooltip": "Steps at the beginning that are computed (mode threshold)."},
                ),
                "forecaster": (
                    names,
                    {"default": _default_forecaster(), "tooltip": "What a reused step adds; none: the last residual."},
                ),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
                    | {"tooltip": "Earlier steps are computed. Percentages are measured as in other nodes."},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Later steps are computed."},
                ),
            },
            "optional": {"backend": ([*_BACKENDS], {"default": "inductor", "tooltip": "Compiles the pieces."})},
        }

    def compile(
        self,
        model: Any,
        mode: str,
        residual_diff_threshold: float,
        warmup_steps: int,
        forecaster: str,
        start_percent: float,
        end_percent: float,
        backend: str = "inductor",
    ) -> tuple[Any]:
        """Returns the model with a cache.

        Raises:
            ConfigError: An input has a value that is not allowed, or the model cannot be cached by `enable_cache`.
        """
        if mode == "off":
            return (model,)
        fields: dict[str, Any] = {
            "residual_diff_threshold": residual_diff_threshold,
            "max_warmup_steps": warmup_steps,
            "forecaster": None if forecaster == _NO_FORECASTER else forecaster,
            "inner_backend": backend,
        }
        if mode == "compile only":
            return (enable_cache(model, CacheConfig(**fields | {"residual_diff_threshold": 0.0})),)
        if mode in _MASKS:  # Nothing is measured, so no block has to run at a reused step.
            fields |= {"Fn_compute_blocks": 0, "probe": "none", "max_warmup_steps": 0}
        fields |= {"start_percent": start_percent, "end_percent": end_percent}
        return (enable_cache(model, mask_policy=_MASKS.get(mode), **fields),)


class CacheReport:
    """Returns what the cache of a model did, as a picture and as text, after a sampler has run."""

    DESCRIPTION = (
        "Shows which steps were computed and which reused. Connect the model from Compile with cache, and the latent "
        "from the sampler, so that this node runs after it."
    )
    CATEGORY = CompileWithCache.CATEGORY
    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("latent", "image", "text")
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # The name that ComfyUI calls.
        """The inputs by name, each with its type and what its widget needs."""
        every_run = {"default": False, "tooltip": "Whether to show all runs of samplers instead of the last one."}
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",), "every_run": ("BOOLEAN", every_run)}}

    def report(self, model: Any, latent: Any, every_run: bool = False) -> tuple[Any, torch.Tensor, str]:
        """Returns the latent as it is, the picture as [1, H, W, 3] (float32, from 0 to 1), and the text.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        cache = cache_of(model)
        if cache is None:
            summary = Summary(notes=["No cache is enabled for this model."])
            return latent, picture_of(summary), summary.notes[0]
        module = model.get_model_object("diffusion_model")
        runs = [*cache.runs] if every_run else [*cache.runs][-1:]
        found = [stats for record in records_of(module, every_generation=True) for stats in record.stats]
        mine = [stats for stats in found if _run_of(stats) in runs]
        summary = Summary(mine, title=type(module).__name__, details=True, calls=calls_of(module))
        return latent, picture_of(summary), str(summary)


def _run_of(stats: CacheStats) -> str:
    return stats.session.partition(",")[0]


def _default(name: str) -> Any:
    return OPTIONS[name].default


def _default_forecaster() -> str:
    default = type(_default("forecaster"))
    return next((name for name, kind in forecasters().items() if kind is default), _NO_FORECASTER)


NODE_CLASS_MAPPINGS: dict[str, type] = {"CacheditCompile": CompileWithCache, "CacheditReport": CacheReport}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "CacheditCompile": "Compile with cache",
    "CacheditReport": "Cache report",
}
