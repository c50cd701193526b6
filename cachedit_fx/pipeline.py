"""The cache in a pipeline: `enable_cache`, `disable_cache`, `refresh_context`. Alone in knowing diffusers."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from cachedit_fx.adapter import BlockAdapter, Nested, transformers_of, with_calibrator
from cachedit_fx.attempts import Attempts
from cachedit_fx.backend import Backend, report_uncached
from cachedit_fx.cache_factory.patch_functors import functor_for
from cachedit_fx.config import FIELD_NAMES, CacheConfig, unknown_option
from cachedit_fx.errors import ConfigError, PassError, PatternError, shown
from cachedit_fx.functor import PatchFunctor
from cachedit_fx.instances import end_generation, instance_of
from cachedit_fx.light import MISSED, LightCalls
from cachedit_fx.passes.inputs import conditioning_names, timestep_name
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.region_watch import RegionWatch
from cachedit_fx.registry import adapter_for, modules_of
from cachedit_fx.session import ModelCall, set_label, within_call

log = logging.getLogger(__name__)

_HOOK = "cachedit_fx"
_COMPILE_KWARGS = ("fullgraph", "dynamic", "mode", "options", "recompile_limit", "isolate_recompiles")
_MISSING = object()
Target = TypeVar("Target")


def enable_cache(
    pipe_or_adapter: Target,
    cache_config: CacheConfig | None = None,
    calibrator_config: object | None = None,
    params_modifiers: Nested = None,
    tuned_on: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Target:
    """Compiles the diffusion transformers of a pipeline in place, with the cache inside. Returns what it was given.

    The modules stay the objects that they are, with their classes, weights and state_dict keys. Calling it again
    changes the configuration; with the same one it does nothing.

    Args:
        pipe_or_adapter: A pipeline, a transformer, or a `BlockAdapter`. For a pipeline whose class has a registered
            adapter that one is taken.
        cache_config: When to reuse; by default `CacheConfig()`.
        calibrator_config: The same as `CacheConfig.forecaster`, by cache-dit's name: what a reused step adds.
        params_modifiers: What the region of each block list does differently, in the order in which the lists run.
        tuned_on: The signature of a tuned configuration, as `load_configs` reads it: warns where something else runs.
        kwargs: `fullgraph`, `dynamic`, `mode` and `options` of `torch.compile` (of these Inductor's, and
            `guard_filter_fn`); fields of `CacheConfig`, each of which replaces that of `cache_config`.

    Raises:
        ConfigError: An argument is unknown or has a value that it cannot have, or there is no transformer.
    """
    found = settings_for(pipe_or_adapter, cache_config, params_modifiers, calibrator_config, **kwargs)
    backends = [settings.backend() for _, settings in found.values()]  # Before anything changes: this is what may fail.
    for name, (module, _) in found.items():
        _require_plain(name, module)
    for (module, settings), backend in zip(found.values(), backends, strict=True):
        _enable(module, settings, backend)
    if tuned_on is not None:
        from cachedit_fx.tuning.signature import check_signature  # It tunes pipelines, so it imports this file.

        check_signature(pipe_or_adapter, tuned_on)
        for module, _ in found.values():
            enabled = _enabled(module)
            if enabled is not None:
                enabled.tuned_size = tuple(tuned_on.get("latents") or ())
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: Any) -> None:
    """Makes a pipeline (or transformer, or what an adapter names) what it was before `enable_cache`.

    Statistics stay; nothing happens where no cache was enabled.
    """
    for module in modules_of(pipe_or_adapter).values():
        _disable(module)


def refresh_context(transformer: Any, cache_config: CacheConfig | None = None, **fields: Any) -> None:
    """Begins anew: ends the running sessions, and changes the given fields of the configuration.

    Compiles anew only if the blocks that run change, or how they are compiled.

    Args:
        transformer: What `enable_cache` was called with, or one of its transformers.
        cache_config: Its given fields replace the present ones.
        fields: More of them, as in `num_inference_steps=50`. `verbose` is taken and ignored.

    Raises:
        ConfigError: No cache is enabled, or a field is unknown or has a value that it cannot have.
    """
    fields.pop("verbose", None)
    change = (cache_config or CacheConfig()).override(**fields)
    for module in modules_of(transformer).values():
        enabled = _enabled(module)
        if enabled is None:
            raise ConfigError(
                f"cachedit_fx: enable_cache was not called for this {type(module).__name__}, so there is nothing to "
                "refresh; call it first, with the same fields"
            )
        settings = replace(enabled.settings, config=enabled.settings.config.override(change))
        backend = settings.backend()
        end_generation(module, everyone=True)
        _enable(module, settings, backend)


@dataclass(frozen=True)
class Settings:
    """What `enable_cache` was asked to do with one transformer."""

    config: CacheConfig
    declared: Declaration
    functor: PatchFunctor | None
    compile_kwargs: Mapping[str, Any]

    def is_built_like(self, other: Settings) -> bool:
        """Whether the two ask for the same of `torch.compile`; their backends are compared apart."""
        return (self.functor, dict(self.compile_kwargs)) == (other.functor, dict(other.compile_kwargs))

    def backend(self) -> Backend:
        mode, options = self.compile_kwargs.get("mode"), dict(self.compile_kwargs.get("options") or {})
        options.pop("guard_filter_fn", None)
        return Backend(self.config, mode=mode, options=options, declared=self.declared, policy_per_call=True)

    @property
    def of_dynamo(self) -> dict[str, Any]:
        """Arguments of `torch.compile` that are not the inner backend's."""
        found = {name: value for name, value in self.compile_kwargs.items() if name not in ("mode", "options")}
        options = self.compile_kwargs.get("options") or {}
        return found | {"options": {k: v for k, v in options.items() if k == "guard_filter_fn"}}


def settings_for(
    pipe_or_adapter: Any,
    cache_config: CacheConfig | None = None,
    params_modifiers: Nested = None,
    calibrator_config: object | None = None,
    **kwargs: Any,
) -> dict[str, tuple[nn.Module, Settings]]:
    """The transformers by name, each with what these arguments of `enable_cache` ask for. Changes nothing.

    Raises:
        ConfigError: An argument is unknown or has a value that it cannot have, or there is no transformer.
    """
    fields = {name: kwargs.pop(name) for name in [*kwargs] if name in FIELD_NAMES and name not in _COMPILE_KWARGS}
    for name, value in kwargs.items():
        if name not in _COMPILE_KWARGS:
            others = f"and of torch.compile {', '.join(_COMPILE_KWARGS)}"
            what = "enable_cache's argument"
            raise ConfigError(unknown_option(name, value, _COMPILE_KWARGS, others=others, what=what))
    if cache_config is not None and not isinstance(cache_config, CacheConfig):
        raise ConfigError(f"cachedit_fx: cache_config must be a CacheConfig, got {shown(cache_config)}")
    options = dict(kwargs.pop("options", None) or {})
    fields |= {name: options.pop(name) for name in [*options] if name in FIELD_NAMES}
    if options:
        kwargs["options"] = options
    config = with_calibrator((cache_config or CacheConfig()).override(**fields), calibrator_config)
    adapter = adapter_for(pipe_or_adapter)
    if adapter is not None:
        if params_modifiers is not None:
            adapter = replace(adapter, params_modifiers=params_modifiers)
        if adapter.has_separate_cfg and config.enable_separate_cfg is None:
            config = config.override(enable_separate_cfg=True)
        modules, declared, functor = adapter.transformers(), adapter.declarations(), adapter.patch_functor
    else:
        modules, functor = transformers_of(pipe_or_adapter), None
        given = [*modules.values()] if len(modules) > 1 else next(iter(modules.values()))
        declared = BlockAdapter(transformer=given, params_modifiers=params_modifiers).declarations()
        declared = dict(zip(modules, declared.values(), strict=True))
    return {name: (module, Settings(config, declared[name], functor, kwargs)) for name, module in modules.items()}


class _Enabled:
    """Stands in a module for its compiled forward: what a call was given is known to the graphs inside.

    It also holds what undoes it; the module holds it, so that it goes with the module.

    Attributes:
        settings: What was asked for last. What only decides when to reuse may change without compiling anew.
        before: What stood in its place.
        tuned_size: Shape, without the batch, of the first tensor that a tuned configuration expects; empty for any.
    """

    tuned_size: tuple[int, ...] = ()

    def __init__(self, module: nn.Module, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.policy = settings.config.policy
        self.before = module.__dict__.get("_compiled_call_impl", _MISSING)
        self.had_registry = hasattr(module, "_diffusers_hook")
        self.names = list(inspect.signature(module.forward).parameters)
        self.timestep = timestep_name(self.names)
        self.conditioning = conditioning_names(self.names)
        self.module = weakref.ref(module)
        self.instance = instance_of(module)
        self.instance.is_guarded = False  # Of what was compiled for an earlier configuration nothing is known here.
        self._watch: RegionWatch | None = None
        self.light = LightCalls(module, is_on=settings.config.fast_dispatch)
        self.compiled = Attempts(module, backend, settings.of_dynamo)
        if hasattr(module, "cache_context"):
            _register_hook(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        if self._watch is not None and self._watch.has_changed():
            self.instance.weights += 1  # What is kept was made by other modules or weights.
            # Anew at once: the next calls may go without Dynamo, and would not come by the place below.
            module = self.module()
            self._watch = RegionWatch(module, self._watch.paths) if module is not None else None
        with within_call(call):
            result = self.light(args, kwargs)
            if result is not MISSED:
                return result
            try:
                result = self.compiled(*args, **kwargs)
            except BackendCompilerFailed as error:  # What is wrong with a declaration is no failure of the compiler.
                if isinstance(error.inner_exception, PatternError | PassError):
                    raise error.inner_exception from None
                raise
        module = self.module()
        if call.ran and module is not None:
            self.light.learn(module, (args, kwargs), call.ran, result)
            paths = call.ran[0][0].region_paths
            if self._watch is None or self._watch.paths != paths:
                self._watch = RegionWatch(module, paths)
        if not call.ran and (self.compiled.full_at or self.instance.is_guarded):
            self.instance.pass_by(call)
        if module is not None and self.compiled.full_at and not call.ran:
            report_uncached(_why_past_limit(module, self.compiled.full_at), self.settings.config)
        if not call.misses or module is None or self.instance.is_guarded:
            return result
        if not self.compiled.give_up():
            report_uncached(_why_uncached(module, call, self.compiled.why_in_parts), self.settings.config)
        elif self.settings.config.on_no_match == "raise":  # What this call returned is not needed, only the verdict.
            return self(*args, **kwargs)
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.tuned_size:
            self._check_size(given)
        prompts = (_first_tensor(given.get(name)) for name in self.conditioning)
        return ModelCall(
            given.get(self.timestep or ""), next(filter(_is_tensor, prompts), None), self.policy, self.instance
        )

    def _check_size(self, given: Mapping[str, Any]) -> None:
        """Warns, once, of a size that was not tuned for."""
        first = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
        if first is not None and tuple(first.shape[1:]) != self.tuned_size:
            log.warning(
                "cachedit_fx: this configuration was tuned on another size, so its quality is not known here.\n"
                "  latents: tuned on %s, found %s\n"
                "What to do: call cachedit_fx.tune with calls of this size.",
                [*self.tuned_size],
                [*first.shape[1:]],
            )
            self.tuned_size = ()


def _why_uncached(module: nn.Module, call: ModelCall, in_parts: str) -> str:
    """What keeps a module from being cached, and what helps."""
    if not in_parts:
        return max(call.misses)[1]  # That of the largest graph.
    name = type(module).__name__
    return "\n".join(
        (
            f"cachedit_fx: {name} runs without caching.",
            "  expected: its loop over the blocks whole in one graph",
            f"  found:    Dynamo captures it only in {len(call.misses)} graphs (it stops at {in_parts})",
            f"What to do: {cure_of_parts(name)}.",
            "See every verdict: cachedit_fx.explain(model, *inputs)",
        )
    )


def _why_past_limit(module: nn.Module, limit: int) -> str:
    """What keeps a call from being cached that no graph fits, where Dynamo compiles no more of them."""
    return "\n".join(
        (
            f"cachedit_fx: {type(module).__name__} runs without caching where a call needs another graph.",
            f"  expected: at most {limit} graph{'s' * (limit != 1)} of one function (Dynamo's recompile_limit)",
            "  found:    a call that none of them fits, where Dynamo compiles no more",
            "What to do: see what differs from call to call (TORCH_LOGS=recompiles) and keep it the same, for example",
            "by hooks that stay registered; or raise torch._dynamo.config.recompile_limit before the first call.",
        )
    )


def cure_of_parts(cls: str) -> str:
    """What makes one graph of a transformer of this class that Dynamo breaks up."""
    functor = functor_for(cls)
    if functor is None:
        return "a patch functor that replaces what stands there helps (docs/functors.md)"
    name = functor.__name__
    return f"{name} makes it one graph: enable_cache(BlockAdapter(..., patch_functor={name}()))"


def _first_tensor(value: Any) -> Any:
    """A prompt may be handed over as a list: a new one at every call, of the same tensors."""
    return value[0] if isinstance(value, list | tuple) and value else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def enabled_settings(module: nn.Module) -> Settings | None:
    """What the cache of a module is enabled with; None where it is not."""
    enabled = _enabled(module)
    return enabled.settings if enabled is not None else None


def _enabled(module: nn.Module) -> _Enabled | None:
    found = module._compiled_call_impl
    return found if isinstance(found, _Enabled) else None


def _enable(module: nn.Module, settings: Settings, backend: Backend) -> None:
    known = _enabled(module)
    if known is not None and known.settings.backend() == backend and known.settings.is_built_like(settings):
        if known.settings != settings:
            end_generation(module, everyone=True)
        # The functor that prepared the module stays: it knows what to put back.
        known.settings = replace(settings, functor=known.settings.functor)
        known.policy = settings.config.policy
        known.light.is_on = settings.config.fast_dispatch
        return
    _disable(module)
    try:
        if settings.functor is not None:
            settings.functor.prepare(module)
        module._compiled_call_impl = _Enabled(module, settings, backend)
    except BaseException:
        if settings.functor is not None:
            settings.functor.restore(module)
        raise


def _require_plain(name: str, module: nn.Module) -> None:
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise ConfigError(f"cachedit_fx: {name} is compiled already; pass the module that torch.compile was given")
    if getattr(module, "is_cache_enabled", False):
        raise ConfigError(f"cachedit_fx: a cache of diffusers is enabled for {name}; call its disable_cache() first")


def _disable(module: nn.Module) -> None:
    enabled = _enabled(module)
    if enabled is None:
        return
    end_generation(module, everyone=True)
    if enabled.before is _MISSING:
        del module.__dict__["_compiled_call_impl"]
    else:
        module._compiled_call_impl = enabled.before
    if hasattr(module, "_diffusers_hook"):
        _remove_hook(module, keep_registry=enabled.had_registry)
    if enabled.settings.functor is not None:
        enabled.settings.functor.restore(module)


def _register_hook(module: nn.Module) -> None:
    """Registers our hook for what it hears. Around the forward it would do nothing, so there it is taken off again:

    the graph stays as it is, and a copy of the module does not call the original's forward.
    """
    from diffusers.hooks.hooks import HookRegistry

    before = module.__dict__.get("forward", _MISSING)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(_HOOK) is None:
        registry.register_hook(_hook_type()(), _HOOK)
        _put_forward(module, before)


def _remove_hook(module: nn.Module, *, keep_registry: bool) -> None:
    before = module.__dict__.get("forward", _MISSING)
    registry: Any = module._diffusers_hook
    registry.remove_hook(_HOOK, recurse=False)
    _put_forward(module, before)
    if not registry.hooks and not keep_registry:
        del module._diffusers_hook


def _put_forward(module: nn.Module, forward: Any) -> None:
    if forward is _MISSING:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _make_hook() -> Any:
    return _hook_type()()


@functools.cache
def _hook_type() -> type:
    """A diffusers hook that hears what `cache_context` calls a branch, and when a pipeline's call is over."""
    from diffusers.hooks.hooks import BaseState, ModelHook, StateManager

    class Labels(StateManager):
        """Hands the label on to this thread's sessions; one transformer may run in several threads."""

        def set_context(self, context: Any) -> None:
            set_label(getattr(context, "name", context))

    class SessionHook(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.labels = Labels(BaseState)  # type: ignore[arg-type]

        def __reduce__(self) -> tuple[Any, ...]:
            return _make_hook, ()  # Its class has no name to be pickled by.

        def reset_state(self, module: nn.Module) -> nn.Module:
            end_generation(module)
            return module

    return SessionHook
