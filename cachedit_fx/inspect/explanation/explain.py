"""Explains what the compiler would do with a model or a pipeline for one call, and why: `explain`."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.frontend.block_holder import block_holder, can_be_divided
from cachedit_fx.frontend.capture_strategies import CAPTURE_STRATEGIES, CaptureStrategies, CaptureStrategy
from cachedit_fx.frontend.offloading import captured_without_hooks, without_casting_hooks
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.frontend.torch_internals import BackendCompilerFailed, OptimizedModule
from cachedit_fx.frontend.uncached import WhyUncached, why_another_cache, why_call_uncached
from cachedit_fx.inspect.explanation.data import Captured
from cachedit_fx.inspect.explanation.dynamo_recorder import (
    DynamoRecorder,
    RecordedGraph,
    Stop,
    forgotten_sizes,
    isolated,
)
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.integrations.block_adapter import BlockAdapter, title_of
from cachedit_fx.integrations.pipelines import enabled_settings, settings_for
from cachedit_fx.patterns.declaration import Declaration

_HOW = {
    CaptureStrategy(True, False): "whole",
    CaptureStrategy(True, True): "whole, with sizes that depend on data",
    CaptureStrategy(False, True): "in parts, with sizes that depend on data",
    CaptureStrategy(False, False): "in parts",
}


def explain(target: Any, *args: Any, cache_config: CacheConfig | None = None, **kwargs: Any) -> Explanation:
    """Explains what the compiler does with a transformer or a pipeline for one call: what is cached, how, or why not.

    The transformer is captured, and the passes run. Nothing is compiled, and neither the model nor its compiled code
    is changed. A transformer that Dynamo captures whole does not run at all; one that Dynamo breaks up, or that has no
    chain as a whole, runs eagerly. A pipeline runs up to the first call of the last of its transformers.

    Args:
        target: A transformer (compiled, cached or neither), a pipeline, or a `BlockAdapter` of either.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        cache_config: The configuration. By default, the one that the cache is enabled or compiled with, or else
            `CacheConfig()`.

    Returns:
        The explanation. Its `str` is a page of text, and its attributes hold the results as data.

    Raises:
        ConfigError: There is no transformer, or the pipeline calls none.
        PatternError: The model contradicts what was declared about it.
    """
    plain = getattr(target, "_orig_mod", target)
    found = settings_for(plain, cache_config)
    calls: dict[str, _Call] = {}
    if isinstance(plain, nn.Module):
        calls = dict.fromkeys(found, _Call(args, kwargs))
        found = {name: (target if module is plain else module, settings) for name, (module, settings) in found.items()}
    else:
        pipe = plain.pipe if isinstance(plain, BlockAdapter) and plain.pipe is not None else plain
        modules = {name: module for name, (module, _) in found.items()}
        if callable(pipe):
            calls = _first_calls(lambda: pipe(*args, **kwargs), modules)
            _end_of_call(pipe)
        elif len(modules) == 1:
            calls = dict.fromkeys(modules, _Call(args, kwargs))
    if not calls:
        raise ConfigError(
            f"cachedit_fx: target must be a transformer or a pipeline that calls one, got {type(plain).__name__}, "
            f"which called none of {', '.join(found)} with these arguments"
        )
    captured: list[Captured] = []
    recorded: list[RecordedGraph] = []
    notes = [f"{name} was not called, so it is not explained." for name in found if name not in calls]
    if torch.is_grad_enabled() and isinstance(plain, nn.Module):
        notes.append(
            "The model was captured without gradients. The cache is for inference only: call the model under "
            "torch.no_grad()."
        )
    for name, call in calls.items():
        module, settings = found[name]
        is_bare = len(found) == 1 and module is target
        settings = _current_settings(module, settings, is_given=cache_config is not None)
        how, graphs = _capture(module, settings, call, "" if is_bare else name)
        captured.append(how)
        recorded += graphs
    return Explanation(title_of(plain), captured, recorded, notes)


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _current_settings(module: nn.Module, settings: Settings, *, is_given: bool) -> Settings:
    """Returns the settings with which the module is cached or compiled already, unless a configuration was given."""
    enabled = enabled_settings(getattr(module, "_orig_mod", module))
    if enabled is not None:  # The functor has prepared the module already.
        enabled = replace(enabled, functor=None)
        return replace(enabled, config=settings.config) if is_given else enabled
    config = _compiled_config(module)
    return settings if is_given or config is None else replace(settings, config=config)


def _compiled_config(module: Any) -> CacheConfig | None:
    """Returns the configuration of `torch.compile(module, backend="cachedit")`; None for another backend."""
    found: Any = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    while found is not None:
        compiler, kwargs = getattr(found, "compiler_fn", None), getattr(found, "kwargs", None)
        if isinstance(kwargs, dict) and compiler is not None:
            name = getattr(compiler, "__module__", "").partition(".")[0]
            if name != "cachedit_fx" and not isinstance(compiler, Backend):
                return None
            base = compiler.config if isinstance(compiler, Backend) else None
            return Backend(base, options=kwargs.get("options")).config
        found = getattr(found, "_torchdynamo_orig_backend", None)
    return None


def _capture(module: nn.Module, settings: Settings, call: _Call, name: str) -> tuple[Captured, list[RecordedGraph]]:
    """Captures one transformer, and returns how it was captured and all of its graphs."""
    is_compiled = isinstance(module, OptimizedModule)
    module = getattr(module, "_orig_mod", module)
    if getattr(module, "is_cache_enabled", False):
        return _captured(module, settings, name, "not at all", "", why_another_cache(module)), []
    # The method of an enabled module has been replaced in the instance.
    method = types.MethodType(getattr(type(module), settings.method), module) if settings.method else None
    called = {*inspect.signature(method or module.forward).parameters, "args"}
    recorder = DynamoRecorder(settings.backend(), called)
    kwargs = {k: v for k, v in settings.compile_kwargs.items() if k in ("fullgraph", "dynamic")}
    kwargs |= {"options": {"guard_filter_fn": recorder.add_risks}, **isolated()}
    # Only enable_cache captures sizes that depend on data; torch.compile with this backend does not.
    allowed = [strategy for strategy in CAPTURE_STRATEGIES if not (is_compiled and strategy.captures_data)]
    strategies = CaptureStrategies(
        module, recorder, kwargs, before_each=recorder.begin, strategies=allowed, call=method
    )
    with _prepared(module, settings), forgotten_sizes(), torch.no_grad(), without_casting_hooks(module):
        try:
            whole = [strategy for strategy in allowed if strategy.whole]
            hook_free = CaptureStrategies(module, recorder, kwargs, recorder.begin, whole, may_break=False)
            if not captured_without_hooks(module, hook_free, call.args, call.kwargs):
                strategies(*call.args, **call.kwargs)
            while not any(one.report.is_cached for one in recorder.recorded) and strategies.drop_strategy():
                strategies(*call.args, **call.kwargs)
        except Stop:
            pass
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
    recorded = recorder.recorded
    for one in recorded:
        one.report = replace(one.report, module=name, cls=type(module).__name__)
    why = None
    if not any(one.report.is_cached for one in recorded):
        limit = strategies.limit_reached if not recorder.uncached else 0
        why = why_call_uncached(
            module, recorder.uncached, strategies.why_in_parts, limit, line=strategies.line_in_parts
        )
    if why is not None and recorder.strategy.whole and can_be_divided(why.kind):
        part = _capture_part(module, settings, call, name)
        if part is not None:
            return part
    captured = _captured(module, settings, name, _HOW[recorder.strategy], strategies.why_in_parts, why)
    return replace(captured, line=strategies.line_in_parts), recorded


def _capture_part(
    module: nn.Module, settings: Settings, call: _Call, name: str
) -> tuple[Captured, list[RecordedGraph]] | None:
    """Captures the submodule that `enable_cache` caches instead if a model as a whole has no chain.

    The model runs eagerly up to the first call of the submodule. Returns None if there is none, or if it is not cached.
    """
    found = None if settings.declared != Declaration() or settings.method is not None else block_holder(module)
    if found is None:
        return None
    path, part = found
    plain: Callable[..., Any] = module._call_impl
    with torch.no_grad():
        calls = _first_calls(lambda: plain(*call.args, **call.kwargs), {path: part})
    if path not in calls:
        return None
    captured, graphs = _capture(part, replace(settings, functor=None), calls[path], f"{name}.{path}".lstrip("."))
    return (captured, graphs) if not captured.reason else None


def _captured(
    module: nn.Module, settings: Settings, name: str, how: str, why_in_parts: str, why: WhyUncached | None
) -> Captured:
    uncached = dict(reason=why.reason, cure=why.cure, message=why.text) if why is not None else {}
    config = settings.config.shown_changes
    return Captured(name, type(module).__name__, how, why_in_parts, config, **uncached)


@contextlib.contextmanager
def _prepared(module: nn.Module, settings: Settings) -> Iterator[None]:
    """Prepares the module with its patch functor, and restores it afterwards."""
    if settings.functor is None:
        yield
        return
    try:
        settings.functor.prepare(module)
        yield
    finally:
        settings.functor.restore(module)


class _AllCalled(BaseException):
    """Stops a pipeline after every transformer was called once. Pipelines do not catch it: it is no `Exception`."""


def _first_calls(run: Callable[[], Any], modules: dict[str, nn.Module]) -> dict[str, _Call]:
    """Runs `run` until each transformer was called once, and returns their first calls by name."""
    calls: dict[str, _Call] = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(_recorded(name, module, calls, len(modules)))
        with contextlib.suppress(_AllCalled):
            run()
    return {name: calls[name] for name in modules if name in calls}


@contextlib.contextmanager
def _recorded(name: str, module: nn.Module, calls: dict[str, _Call], count: int) -> Iterator[None]:
    """Records the first call of the module. The calls run eagerly, without what the module was compiled with."""
    held = module.__dict__
    had, before = "_compiled_call_impl" in held, held.get("_compiled_call_impl")
    plain = getattr(module, "_orig_mod", module)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.setdefault(name, _Call(args, kwargs))
        if len(calls) == count:
            raise _AllCalled
        return plain._call_impl(*args, **kwargs)

    held["_compiled_call_impl"] = record
    try:
        yield
    finally:
        if had:
            held["_compiled_call_impl"] = before
        else:
            del held["_compiled_call_impl"]


def _end_of_call(pipe: Any) -> None:
    """Moves offloaded components back, as the pipeline would have done at its end."""
    free = getattr(pipe, "maybe_free_model_hooks", None)
    if callable(free):
        free()
