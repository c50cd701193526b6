"""Enables and disables the cache of a pipeline: `enable_cache`, `disable_cache`, `refresh_context`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from cachedit_fx.config.cache_config import OPTION_NAMES, CacheConfig, unknown_option
from cachedit_fx.errors import ConfigError, did_you_mean, shown
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.frontend.enabled import MISSING, Bystander, Enabled, enabled_of, uncounted_call
from cachedit_fx.frontend.entry_points import unwatch_methods, watch_methods
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.frontend.torch_internals import OptimizedModule
from cachedit_fx.integrations.adapter_registry import adapter_for, modules_of
from cachedit_fx.integrations.adapter_watch import watch_adapters
from cachedit_fx.integrations.block_adapter import BlockAdapter, Nested, transformers_of, with_calibrator
from cachedit_fx.integrations.foreign_configs import (
    as_cache_config,
    as_calibrator,
    without_legacy,
    without_other_parts,
)
from cachedit_fx.integrations.session_hook import register_hook, remove_hook
from cachedit_fx.integrations.signature import check_signature
from cachedit_fx.runtime.instances import KEY, end_generation

_COMPILE_KWARGS = ("fullgraph", "dynamic", "mode", "options", "recompile_limit", "isolate_recompiles")
Target = TypeVar("Target")


def enable_cache(
    pipe_or_adapter: Target,
    cache_config: Any = None,
    calibrator_config: object | None = None,
    params_modifiers: Nested = None,
    tuned_on: Mapping[str, Any] | None = None,
    method: str | None = None,
    **kwargs: Any,
) -> Target:
    """Compiles the diffusion transformers of a pipeline in place, with the cache, and returns its first argument.

    The modules remain the same objects, with the same classes, weights and state_dict keys. A second call changes the
    configuration. With the same configuration, it does nothing.

    Args:
        pipe_or_adapter: A pipeline, a transformer, or a `BlockAdapter`. If an adapter is registered for the class of
            the pipeline, it is used.
        cache_config: The configuration, which decides when to reuse; by default `CacheConfig()`. A
            `FirstBlockCacheConfig`, `MagCacheConfig` or `TaylorSeerCacheConfig` of diffusers, and a configuration
            object of cache-dit, are translated. If the pipeline has several transformers, this may also be a dict of
            one configuration for each, by its name in the pipeline.
        calibrator_config: The same as `CacheConfig.forecaster`, under the name that it has in cache-dit.
        params_modifiers: The overrides for the region of each block list, in the order in which the lists run.
        tuned_on: The signature of a tuned configuration, as `load_configs` returns it. A warning is logged if the
            pipeline or the size differs from it.
        method: The method that is called instead of the transformer itself, such as `"forward_with_cfg"`, which some
            samplers call. This method is compiled and cached; calls of the transformer itself are not.
        kwargs: `fullgraph`, `dynamic`, `mode`, `options`, `recompile_limit` and `isolate_recompiles` of
            `torch.compile`, and fields of `CacheConfig`, which override those of `cache_config`. `options` may contain
            options of Inductor, `guard_filter_fn`, and fields of `CacheConfig`. Arguments of cache-dit that are not
            about caching (`parallelism_config`, `attention_backend`, `quantize_config`) are left out, with a warning.

    Raises:
        ConfigError: An argument is unknown, its value is not allowed, or there is no transformer.
    """
    requested = settings_for(pipe_or_adapter, cache_config, params_modifiers, calibrator_config, **kwargs)
    found = {name: (module, replace(settings, method=method)) for name, (module, settings) in requested.items()}
    backends = [settings.backend() for _, settings in found.values()]  # This may fail, so it precedes every change.
    for name, (module, _) in found.items():
        require_plain(name, module)
        _require_method(module, method)
    for (module, settings), backend in zip(found.values(), backends, strict=True):
        _enable(module, settings, backend)
    if tuned_on is not None:
        check_signature(pipe_or_adapter, tuned_on)
        for module, _ in found.values():
            enabled = enabled_of(module)
            if enabled is not None:
                enabled.tuned_size = tuple(tuned_on.get("latents") or ())
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: Any) -> None:
    """Restores a pipeline, a transformer, or the transformers of an adapter to the state before `enable_cache`.

    Statistics remain available. Nothing happens if no cache was enabled. If a transformer runs its blocks together with
    other ranks, it remains compiled, because they may still cache: every step computes from now on.
    """
    for module in modules_of(pipe_or_adapter).values():
        _disable(module)


def refresh_context(
    transformer: Any, cache_config: Any = None, calibrator_config: object | None = None, **fields: Any
) -> None:
    """Ends the running sessions, and changes the given fields of the configuration.

    This triggers a recompilation only if the set of blocks that run changes, or the way in which they are compiled.

    Args:
        transformer: The argument that `enable_cache` was called with, or one of its transformers.
        cache_config: The fields that it was given replace the current ones. What `enable_cache` translates is
            accepted here as well.
        calibrator_config: The same as the field `forecaster`, under the name that it has in cache-dit.
        fields: Further fields, such as `num_inference_steps=50`. `verbose` is accepted and ignored.

    Raises:
        ConfigError: No cache is enabled, a field is unknown, or its value is not allowed.
    """
    fields.pop("verbose", None)
    base = as_cache_config(cache_config) or CacheConfig()
    change = with_calibrator(base.override(**fields), as_calibrator(calibrator_config))
    for module in modules_of(transformer).values():
        enabled = enabled_of(module)
        if enabled is None:
            raise ConfigError(
                f"cachedit_fx: enable_cache was not called for this {type(module).__name__}, so there is nothing to "
                "refresh; call it first, with the same fields"
            )
        settings = replace(enabled.settings, config=enabled.settings.config.override(change))
        backend = settings.backend()
        end_generation(module, everyone=True)
        _enable(module, settings, backend)


def settings_for(
    pipe_or_adapter: Any,
    cache_config: Any = None,
    params_modifiers: Nested = None,
    calibrator_config: object | None = None,
    **kwargs: Any,
) -> dict[str, tuple[nn.Module, Settings]]:
    """Returns the transformers by name, each with its settings for these arguments of `enable_cache`.

    Nothing is changed.

    Raises:
        ConfigError: An argument is unknown, its value is not allowed, or there is no transformer.
    """
    without_other_parts(kwargs, "enable_cache was given")
    calibrator = as_calibrator(without_legacy(kwargs, calibrator_config))
    fields = {name: kwargs.pop(name) for name in [*kwargs] if name in OPTION_NAMES and name not in _COMPILE_KWARGS}
    for name, value in kwargs.items():
        if name not in _COMPILE_KWARGS:
            others = f"and of torch.compile {', '.join(_COMPILE_KWARGS)}"
            what = "enable_cache's argument"
            raise ConfigError(unknown_option(name, value, _COMPILE_KWARGS, others=others, what=what))
    options = dict(kwargs.pop("options", None) or {})
    fields |= {name: options.pop(name) for name in [*options] if name in OPTION_NAMES}
    if options:
        kwargs["options"] = options
    adapter = adapter_for(pipe_or_adapter)
    if adapter is not None:
        if params_modifiers is not None:
            adapter = replace(adapter, params_modifiers=params_modifiers)
        modules, declared, functor = adapter.transformers(), adapter.declarations(), adapter.patch_functor
    else:
        modules, functor = transformers_of(pipe_or_adapter), None
        given = [*modules.values()] if len(modules) > 1 else next(iter(modules.values()))
        declared = BlockAdapter(transformer=given, params_modifiers=params_modifiers).declarations()
        declared = dict(zip(modules, declared.values(), strict=True))
    configs = {
        name: with_calibrator((as_cache_config(base) or CacheConfig()).override(**fields), calibrator)
        for name, base in _by_name(cache_config, modules).items()
    }
    if adapter is not None and adapter.has_separate_cfg:
        configs = {
            name: config if config.enable_separate_cfg is not None else config.override(enable_separate_cfg=True)
            for name, config in configs.items()
        }
    return {name: (m, Settings(configs[name], declared[name], functor, kwargs)) for name, m in modules.items()}


def _by_name(cache_config: Any, modules: Mapping[str, nn.Module]) -> Mapping[str, Any]:
    """Returns what was given as the configuration of each transformer, by its name.

    Raises:
        ConfigError: It is a mapping whose names are not those of the transformers.
    """
    if not isinstance(cache_config, Mapping):
        return dict.fromkeys(modules, cache_config)
    if {*cache_config} != {*modules}:
        raise ConfigError(
            f"cachedit_fx: cache_config must be a CacheConfig, or a dict of one for each of {', '.join(modules)}, "
            f"got {shown(cache_config)}"
        )
    return cache_config


def enabled_settings(module: nn.Module) -> Settings | None:
    """Returns the settings with which the cache of a module is enabled; None if it is not enabled."""
    enabled = enabled_of(module)
    return enabled.settings if enabled is not None else None


def _enable(module: nn.Module, settings: Settings, backend: Backend) -> None:
    current = enabled_of(module)
    if (
        current is not None
        and current.part is None
        and current.settings.backend() == backend
        and current.settings.has_compile_arguments_of(settings)
    ):
        if current.settings != settings:
            end_generation(module, everyone=True)
        # The functor that prepared the module is retained, because it holds the methods to restore.
        current.settings = replace(settings, functor=current.settings.functor)
        current.policy = settings.config.runtime_fields
        current.fast_dispatch.is_on = settings.config.fast_dispatch and settings.method is None
        return
    _disable(module)
    try:
        if settings.functor is not None:
            settings.functor.prepare(module)
        enabled = Enabled(module, settings, backend)
        if hasattr(module, "cache_context"):
            register_hook(module)
    except BaseException:
        if settings.functor is not None:
            settings.functor.restore(module)
        raise
    if current is None:
        enabled.instance.calls.clear()  # The counts are those since the cache was enabled.
    module.__dict__[KEY] = module.__dict__[enabled.place] = enabled
    if settings.method is None:
        watch_methods(module, uncounted_call)
    watch_adapters(module)


def require_plain(name: str, module: nn.Module) -> None:
    """Checks that a module is neither compiled nor cached by something else.

    Raises:
        ConfigError: It is.
    """
    if isinstance(module, OptimizedModule):
        raise ConfigError(f"cachedit_fx: {name} is compiled already; pass the module that torch.compile was given")
    if getattr(module, "is_cache_enabled", False):
        raise ConfigError(f"cachedit_fx: a cache of diffusers is enabled for {name}; call its disable_cache() first")


def _require_method(module: nn.Module, method: str | None) -> None:
    if method is None or (isinstance(method, str) and callable(getattr(type(module), method, None))):
        return
    methods = {*dir(type(module))} - {*dir(nn.Module)} | {"forward"}
    raise ConfigError(
        f"cachedit_fx: method must be the name of a method of {type(module).__name__}, got {shown(method)}."
        f"{did_you_mean(method, methods)}"
    )


def _disable(module: nn.Module) -> None:
    unwatch_methods(module)
    enabled: Any = module.__dict__.pop(KEY, None)
    if not isinstance(enabled, Enabled) or enabled.module() is not module:  # A shallow copy has another's attribute.
        return
    end_generation(module, everyone=True)
    enabled.instance.is_enabled = enabled.instance.has_cached_graph = False
    enabled.remove_part()
    is_in_place = module.__dict__.get(enabled.place) is enabled  # The attribute may have been replaced since.
    if is_in_place:
        if enabled.instance.shares_decisions:
            module.__dict__[enabled.place] = Bystander(enabled)
        elif enabled.before is MISSING:
            del module.__dict__[enabled.place]
        else:
            module.__dict__[enabled.place] = enabled.before
    enabled.casts.restore()
    if hasattr(module, "_diffusers_hook"):
        remove_hook(module, keep_registry=enabled.had_registry)
    if enabled.settings.functor is not None:
        enabled.settings.functor.restore(module)
