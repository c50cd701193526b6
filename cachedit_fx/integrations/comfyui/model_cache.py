"""Enables the cache for a model of ComfyUI: `enable_cache`, which a custom node calls.

At every step, ComfyUI concatenates the conditionings (positive, negative, regional) into new tensors. Which of them are
in one batch, and in which order, depends on the free memory. `transformer_options` says which sample belongs to which
conditioning: `cond_or_uncond` and `uuids` have one entry for each conditioning of the batch. With the cache, every
conditioning is a call of its own, with its own session, so that its cached values are found whatever the batch was.

Nothing of ComfyUI is imported. The wrappers have the signatures of `comfy.patcher_extension`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.frontend.enabled import CALL, MISSING, Enabled
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.integrations.comfyui.sampler_steps import StepLimits, at_sigma
from cachedit_fx.integrations.pipelines import require_plain, settings_for
from cachedit_fx.runtime.guidance_branch import within_guidance_branch
from cachedit_fx.runtime.instances import KEY, end_generation
from cachedit_fx.runtime.request import session

_KEY = "cachedit_fx"  # The key of the wrappers. A second `enable_cache` replaces those of the first.
_NAMES = {0: "cond", 1: "uncond"}  # The meaning of the entries of `cond_or_uncond`.
_runs = itertools.count(1)


def enable_cache(
    model: Any, cache_config: CacheConfig | None = None, *, mask_policy: str | None = None, **kwargs: Any
) -> Any:
    """Returns a clone of a ComfyUI model whose diffusion model is compiled and cached.

    The cache is in place only while the clone is called: `model` itself and its other clones are not changed, although
    they share the diffusion model. Every run of a sampler is one generation. Decisions are made for each conditioning.

    `start_percent` and `end_percent` of the configuration are percentages of the noise schedule, from 0 to 1, as in
    other nodes of ComfyUI (`percent_to_sigma`). `final_compute_steps` refers to the steps of the sampler.

    Args:
        model: What a node receives as MODEL: a `comfy.model_patcher.ModelPatcher`.
        cache_config: The configuration, which decides when to reuse; by default `CacheConfig()`.
        mask_policy: The `mask_policy` of `cachedit_fx.steps_mask`: "slow", "medium", "fast" or "ultra". Each run of a
            sampler gets the mask for its number of steps, which alone decides between `start_percent` and
            `end_percent`.
        kwargs: The same as for `cachedit_fx.enable_cache`: arguments of `torch.compile`, and fields of `CacheConfig`.

    Raises:
        ConfigError: `model` has no diffusion model or no wrappers, an argument is unknown, or its value is not allowed.
    """
    needed = ("clone", "get_model_object", "add_wrapper_with_key", "remove_wrappers_with_key")
    if not all(callable(getattr(model, name, None)) for name in needed):
        raise ConfigError(
            f"cachedit_fx: model must be a ModelPatcher of ComfyUI 0.3.8 or later (a node's MODEL input), got "
            f"{shown(model)}; for a transformer or a pipeline, call cachedit_fx.enable_cache"
        )
    patcher = model.clone()
    cache = ModelCache(lambda module: _settings(module, cache_config, kwargs), mask_policy)
    cache.enabled(patcher.get_model_object("diffusion_model"))  # Checks the arguments now, not at the first call.
    for kind, wrapper in (("outer_sample", cache.outer_sample), ("apply_model", cache.apply_model)):
        patcher.remove_wrappers_with_key(kind, _KEY)
        patcher.add_wrapper_with_key(kind, _KEY, wrapper)
    return patcher


def _settings(module: nn.Module, config: CacheConfig | None, kwargs: Mapping[str, Any]) -> Settings:
    require_plain("the diffusion model", module)
    ((_, settings),) = settings_for(module, config, **kwargs).values()
    return settings


def cache_of(model: Any) -> ModelCache | None:
    """The cache that `enable_cache` gave to a model, or to one that the model is a clone of; None if there is none."""
    get_wrappers = getattr(model, "get_wrappers", None)
    wrappers = get_wrappers("apply_model", _KEY) if callable(get_wrappers) else ()
    owners = [getattr(wrapper, "__self__", None) for wrapper in wrappers]
    return next((owner for owner in owners if isinstance(owner, ModelCache)), None)


class ModelCache:
    """The cache of one clone: the wrappers that it registers with ComfyUI.

    Args:
        settings_for: Returns the settings for a diffusion model.
        mask_policy: See `enable_cache`.

    Attributes:
        runs: The names of the last runs of a sampler that called the clone, in their order.
    """

    def __init__(self, settings_for: Callable[[nn.Module], Settings], mask_policy: str | None = None) -> None:
        self._settings_for = settings_for
        self._mask_policy = mask_policy
        # With several devices, ComfyUI copies the diffusion model to each of them.
        self._enabled: WeakKeyDictionary[nn.Module, Enabled] = WeakKeyDictionary()
        self._limits: StepLimits | None = None
        self._policy: tuple[Any, Any] = (None, None)  # The sigmas of a run, and the policy for it.
        self.runs: deque[str] = deque(maxlen=64)  # As many as there are statistics of sessions.

    def enabled(self, module: nn.Module) -> Enabled:
        """Returns what replaces the call of a diffusion model."""
        if module not in self._enabled:
            settings = self._settings_for(module)
            self._limits = StepLimits.of(settings.config, self._mask_policy)
            if self._limits is not None:
                settings = replace(settings, config=self._limits.within(settings.config))
            self._enabled[module] = Enabled(module, settings, settings.backend())
        return self._enabled[module]

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes one run of a sampler, which is one generation."""
        run = f"run {next(_runs)}"
        self.runs.append(run)
        with session(run):
            try:
                return executor(*args, **kwargs)
            finally:
                self._policy = (None, None)
                for module in [*self._enabled]:
                    end_generation(module)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes one call of the model, with the cache in place."""
        base_model = executor.class_obj
        enabled = self.enabled(base_model.diffusion_model)
        if self._limits is not None:
            self._limit(enabled, self._limits, base_model, _options_of(args, kwargs).get("sample_sigmas"))
        sigma = args[1] if len(args) > 1 else None
        with _in_place(base_model.diffusion_model, enabled), at_sigma(sigma):
            return _call_per_conditioning(executor, args, kwargs)

    def _limit(self, enabled: Enabled, limits: StepLimits, base_model: Any, sample_sigmas: Any) -> None:
        """Applies the limits to the present run of a sampler."""
        known, policy = self._policy
        if policy is None or known is not sample_sigmas:
            decider = limits.decider_for(base_model.model_sampling, sample_sigmas)
            policy = limits.within(enabled.settings.config, decider).runtime_fields
            self._policy = (sample_sigmas, policy)
        enabled.policy = policy


@contextlib.contextmanager
def _in_place(module: nn.Module, enabled: Enabled) -> Iterator[None]:
    """Puts the compiled call into the module for the duration of the block."""
    held = module.__dict__
    before = {name: held.get(name, MISSING) for name in (CALL, KEY)}
    enabled.instance.is_enabled = True
    held[CALL] = held[KEY] = enabled
    try:
        yield
    finally:
        for name, value in before.items():
            if value is MISSING:
                held.pop(name, None)
            else:
                held[name] = value


def _call_per_conditioning(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Makes one call for every conditioning of a batch, under its name, and concatenates the outputs.

    A batch whose samples cannot be told apart is one call. Its conditionings are then recognized by their content.
    """
    options = _options_of(args, kwargs)
    which, uuids = options.get("cond_or_uncond") or (), options.get("uuids") or ()
    first = next(_tensors((*args, *kwargs.values())), None)
    size = first.shape[0] if first is not None and first.dim() else 0
    if not which or len(uuids) != len(which) or size % len(which):
        return call(*args, **kwargs)
    outputs = []
    for i, (kind, uuid) in enumerate(zip(which, uuids, strict=True)):
        rows = slice(i * size // len(which), (i + 1) * size // len(which))
        mine = {**options, "cond_or_uncond": [kind], "uuids": [uuid]}
        chunk_args, chunk_kwargs = _rows((args, kwargs), rows, size, {id(options): mine})
        with within_guidance_branch(f"{_NAMES.get(kind, f'conditioning {kind}')} {uuid}"):
            outputs.append(call(*chunk_args, **chunk_kwargs))
    return _concatenated(outputs)


def _options_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `transformer_options` among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if _is_options(value)), {})


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and "cond_or_uncond" in value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _rows(value: Any, rows: slice, size: int, replaced: Mapping[int, Any]) -> Any:
    """Returns the part of an argument that belongs to the samples `rows` of a batch of `size` samples.

    Tensors with one entry per sample are sliced. All others belong to every sample.

    Args:
        replaced: `id` of an object -> what replaces it.
    """
    if id(value) in replaced:
        return replaced[id(value)]
    if isinstance(value, torch.Tensor):
        return value[rows] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: _rows(one, rows, size, replaced) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(one, rows, size, replaced) for one in value)
    return value


def _concatenated(outputs: Sequence[Any]) -> Any:
    """Concatenates outputs of equal structure along the batch."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat([*outputs])
    if isinstance(first, list | tuple):
        return type(first)(_concatenated(parts) for parts in zip(*outputs, strict=True))
    return first
