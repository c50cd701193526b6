"""`Enabled`: replaces the compiled forward of a module for which the cache is enabled; makes and counts its calls."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import PassError, PatternError, cut
from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.frontend.block_holder import block_holder, can_be_divided
from cachedit_fx.frontend.call_records import SavedCalls
from cachedit_fx.frontend.capture_strategies import CaptureStrategies, CaptureStrategy
from cachedit_fx.frontend.entry_points import has_tensor
from cachedit_fx.frontend.fast_dispatch import NOT_SERVED, FastDispatcher
from cachedit_fx.frontend.offloading import Casts, OffloadedCalls, Refusal
from cachedit_fx.frontend.region_watch import RegionWatch
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.frontend.torch_internals import BackendCompilerFailed
from cachedit_fx.frontend.uncached import (
    WhyUncached,
    report_uncached,
    why_another_cache,
    why_call_uncached,
    why_not_counted,
    why_not_without_hooks,
)
from cachedit_fx.frontend.weight_hooks import find_weight_hooks
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.names import conditioning_names, timestep_name
from cachedit_fx.runtime.instances import KEY, installed_in, instance_of
from cachedit_fx.runtime.model_call import ModelCall, current_call, within_call

log = logging.getLogger(__name__)

CALL = "_compiled_call_impl"  # The attribute of a module that `nn.Module.__call__` calls; `Module.compile` sets it.
MISSING = object()


class Enabled:
    """Replaces the compiled forward of a module. The graphs inside a call know the arguments of the call.

    It also holds what `disable_cache` needs to undo it. The module owns it. A copy of the module (by `copy.deepcopy` or
    `pickle`) gets an object of its own, with the same settings and no sessions.

    Args:
        had_registry: Whether the module had hooks of diffusers before; by default, the module is examined.

    Attributes:
        part: The `Enabled` object of the submodule that is cached instead, if the module as a whole has no chain. The
            rest of the module then runs as it is.
        settings: The last arguments. Fields that only decide when to reuse can change without a recompilation.
        before: The attribute that it replaced.
        saved: The graphs that another process has saved, which are restored at the first call that needs them.
        tuned_size: The shape, without the batch, of the first tensor that the configuration was tuned for; empty for
            any shape.
    """

    def __init__(
        self, module: nn.Module, settings: Settings, backend: Backend, *, had_registry: bool | None = None
    ) -> None:
        self.part: Enabled | None = None
        self._is_part = self._has_tried_part = False
        self._last_why: WhyUncached | None = None
        self.settings = settings
        self.policy = settings.config.runtime_fields
        self.tuned_size: tuple[int, ...] = ()
        before = module.__dict__.get(self.place, MISSING)
        self.before: Any = before.enabled.before if isinstance(before, Bystander) else before
        self.had_registry = hasattr(module, "_diffusers_hook") if had_registry is None else had_registry
        called = getattr(module, settings.method or "forward")
        self.names = list(inspect.signature(called).parameters)
        self.timestep = timestep_name(self.names)
        self.conditioning = conditioning_names(self.names)
        self.module = weakref.ref(module)
        self.instance = instance_of(module)
        self.instance.is_enabled = self.instance.keeps_sessions = True
        self.instance.has_cached_graph = False  # Graphs of an earlier configuration do not count.
        self._watch: RegionWatch | None = None
        self._lock = released_in_child(threading.Lock())
        self.fast_dispatch = FastDispatcher(module, is_on=settings.config.fast_dispatch and settings.method is None)
        method = called if settings.method else None
        self.compiled = CaptureStrategies(module, backend, settings.dynamo_arguments, call=method)
        self._offloaded = OffloadedCalls(module, backend, settings.dynamo_arguments)
        self.casts = Casts()
        self.saved: SavedCalls | None = None
        self._cached_strategy: CaptureStrategy | None = None  # The last strategy with a cached graph.
        self._has_been_cached = False  # Whether any call ran a cached graph, with or without hooks.
        self._may_have_diffusers_cache = hasattr(type(module), "is_cache_enabled")

    @property
    def place(self) -> str:
        """The attribute of the module that it replaces."""
        return self.settings.method or CALL

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._offloaded.turn():
            return self._serve(args, kwargs)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, call = self.module(), self._call(args, kwargs)
        if self._may_have_diffusers_cache and module is not None and module.is_cache_enabled:
            return self._uncached(call, why_another_cache(module), self.compiled.plain(*args, **kwargs))
        watch = self._watch
        if module is not None and watch is not None and watch.has_changed():
            self._invalidate(module, watch)
        refused: Refusal | None = None
        around, part = current_call(), self.part
        with within_call(call):
            result = self.fast_dispatch(args, kwargs) if part is None else self.compiled.plain(*args, **kwargs)
            if result is NOT_SERVED:
                result, refused = self._call_without_hooks(call, args, kwargs)
        if call.ran and module is not None:
            with self._offloaded.turn():
                self._learn(module, call, (args, kwargs), result)
        if call.num_served or module is None:
            self.instance.calls.count_served(is_reused=call.has_reused)
            if around is not None and self._is_part:
                around.num_served += 1
                around.has_reused |= call.has_reused
            return result
        if part is not None:
            return self._part_uncached(part, call, result)
        if refused is not None and refused.why is not None:
            return self._uncached(call, refused.why, result)
        # If no graph was cached before, the limit is not the reason.
        is_limit = self._cached_strategy is not None or not call.uncached_graphs
        limit = self.compiled.limit_reached if is_limit else 0
        why = why_call_uncached(
            module,
            call.uncached_graphs,
            self.compiled.why_in_parts,
            limit,
            line=self.compiled.line_in_parts,
            is_off=refused is not None,
        )
        if limit:
            return self._uncached(call, why, result)
        has_another_strategy = self.compiled.strategy != self._cached_strategy and self.compiled.drop_strategy()
        has_another_strategy = has_another_strategy or self._enable_part(module, why)
        if has_another_strategy and self.settings.config.on_no_match == "raise":
            return self._serve(args, kwargs)  # Tries the next strategy before it raises an error.
        return self._uncached(call, why, result, is_certain=not has_another_strategy)

    def call_computing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a call after the cache was disabled."""
        with within_call(self._call(args, kwargs)):
            return self._call_dynamo(args, kwargs)

    def _enable_part(self, module: nn.Module, why: WhyUncached) -> bool:
        """Enables the cache for the submodule that holds the blocks, if there is one. Returns whether there is.

        Args:
            why: Why the module as a whole, which was captured as one graph, is not cached.
        """
        is_declared = self.settings.declared != Declaration() or self.settings.method is not None
        with self._lock:
            if self.part is not None:  # Another thread has enabled it.
                return True
            is_refused = self._has_tried_part or is_declared or not can_be_divided(why.kind)
            found = None if is_refused else block_holder(module)
            self._has_tried_part = True
            if found is None:
                return False
            settings, (_, inner) = replace(self.settings, functor=None), found
            part = installed_in(inner) or Enabled(inner, settings, settings.backend())
            if part.settings != settings:  # The user has enabled it.
                return False
            part._is_part, self._last_why, self.part = True, why, part
            inner.__dict__[KEY] = inner.__dict__[CALL] = part
            return True

    def remove_part(self) -> None:
        """Restores the submodule that is cached instead, if there is one."""
        module = self.part.module() if self.part is not None else None
        if module is not None and installed_in(module) is self.part:
            del module.__dict__[KEY], module.__dict__[CALL]
            self.part.instance.is_enabled = self.part.instance.has_cached_graph = False
        self.part = None

    def _part_uncached(self, part: Enabled, call: ModelCall, result: Any) -> Any:
        """Reports a call in which the submodule that is cached instead was not served by the cache."""
        assert self._last_why is not None
        if part._cached_strategy is not None:
            return self._uncached(call, part._last_why or self._last_why, result)
        is_certain = part._last_why is not None or not part.instance.calls.counts.total
        if is_certain:
            self.remove_part()
        return self._uncached(call, self._last_why, result, is_certain=is_certain)

    def _invalidate(self, module: nn.Module, changed: RegionWatch) -> None:
        """Makes the values unusable that were cached from other modules or weights.

        Several threads may notice the same change, and only the first one counts it. Otherwise a late thread would
        invalidate what the others have computed since.
        """
        with self._lock:
            if self._watch is changed:
                self.instance.weights_version += 1
                # Not left to `_learn`, since calls that are served without Dynamo do not reach it.
                self._watch = RegionWatch(module, changed.paths)

    def forget_weights(self) -> None:
        """Makes the values unusable that were cached from the present weights, which are about to change or did."""
        with self._lock:
            self.instance.weights_version += 1

    def _call_without_hooks(
        self, call: ModelCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Refusal | None]:
        """The output. Hooks that only move or cast weights are left out of the graph, unless the graph is refused."""
        module = self.module()
        hooks = find_weight_hooks(module) if module is not None else None
        if hooks is None or module is None:
            return self._call_dynamo(args, kwargs), None
        self.casts.replace(hooks)
        if not hooks.hooked:
            return self._call_dynamo(args, kwargs), None
        obstacle = hooks.obstacle
        if self.settings.method is not None:
            obstacle = f"method={self.settings.method!r}, for which hooks are not left out"
        if obstacle:
            return self._call_dynamo(args, kwargs), Refusal(why_not_without_hooks(module, obstacle))
        self.fast_dispatch.refuse("hooks move its weights")
        with self._offloaded.turn(begin=True):
            result = self._offloaded(module, hooks, call, args, kwargs)
            if isinstance(result, Refusal):
                return self._call_dynamo(args, kwargs), result
        return result, None

    def _restore_saved(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a call for which another process has saved the graph; `NOT_SERVED` if there is none."""
        assert self.saved is not None
        cached_call = self.saved.restore(module, self.compiled.backend, self.fast_dispatch, (args, kwargs))
        if cached_call is not None:
            self._has_been_cached, self._cached_strategy = True, self.compiled.strategy
            if self._watch is None:
                self._watch = RegionWatch(module, cached_call.region_paths)
        return self.fast_dispatch(args, kwargs)  # Another thread may have restored the graph.

    def _call_dynamo(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module()
        if self.saved is not None and module is not None:
            result = self._restore_saved(module, args, kwargs)
            if result is not NOT_SERVED:
                return result
        try:
            return self.compiled(*args, **kwargs)
        except BackendCompilerFailed as error:  # An error in a declaration is not a failure of the compiler.
            if isinstance(error.inner_exception, PatternError | PassError):
                raise error.inner_exception from None
            raise

    def _learn(self, module: nn.Module, call: ModelCall, given: tuple[Any, Any], result: Any) -> None:
        """Uses what is known after a call that Dynamo served with the cache."""
        self._has_been_cached = True
        if not call.is_offloaded:
            self._cached_strategy = self.compiled.strategy
            self.fast_dispatch.learn(module, given, call.ran, result)
        paths = call.ran[0][0].region_paths
        if self._watch is None or self._watch.paths != paths:
            self._watch = RegionWatch(module, paths)

    def _uncached(self, call: ModelCall, why: WhyUncached, result: Any, *, is_certain: bool = True) -> Any:
        """Counts a call that ran without the cache, and reports why.

        Args:
            is_certain: Whether no other capture strategy is left for the next call to try.
        """
        if self._has_been_cached or self.compiled.limit_reached:
            self.instance.record_uncached(call.conditioning, call.unread_timestep)
        self.instance.has_cached_graph = False
        self.instance.calls.count_not_served(why.reason)
        if self._is_part:  # The model that it is a part of reports it.
            self._last_why = why if is_certain else None
        elif is_certain:
            report_uncached(why, self.settings.config, self.instance.reported)
        return result

    def uncounted_call(self, module: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Makes a call of a method that runs the blocks of the module, and counts it if it bypassed the cache."""
        known, within = self.instance.calls.counts.total, current_call()
        result = call()
        is_inside = within is not None and within.instance is self.instance
        if is_inside or self.instance.calls.counts.total != known or not has_tensor(result):
            return result
        why = why_not_counted(module, method)
        self.instance.calls.count_not_served(why.reason, reached_cache=False)
        report_uncached(why, self.settings.config, self.instance.reported)
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
        """Warns once of a size for which the configuration was not tuned."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self.module()
        copied = memo.get(id(module))  # The copy of a module exists before its attributes do.
        if copied is None:
            return None
        return _copied(copied, *self._transferred(lambda settings: copy.deepcopy(settings, memo)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.module(), *self._transferred(lambda settings: pickle.loads(pickle.dumps(settings))))

    def _transferred(
        self, copied: Callable[[Settings], Settings]
    ) -> tuple[Settings | None, str, bool, tuple[int, ...]]:
        """What a copy of the module needs. Without settings, and with a warning, if they cannot be copied."""
        settings, why = None, ""
        if self.settings.functor is not None:
            why = "a patch functor, which holds what it replaced in this module"
        try:
            settings = None if why else copied(self.settings)
        except Exception as error:  # A user's own objects are in there.
            why = f"{type(error).__name__}: {cut(error, 160)}"
        if why:
            log.warning(
                "cachedit_fx: a copy of this %s has no cache, because the settings of the cache cannot be copied.\n"
                "  found: %s\n"
                "What to do: call enable_cache for the copy.",
                type(self.module()).__name__,
                why,
            )
        return settings, self.place, self.had_registry, self.tuned_size


class Bystander:
    """Replaces the compiled forward after `disable_cache`, if other ranks run the blocks together with this one.

    They may still cache, and would wait for this rank where they decide. Therefore the same graphs run. Every step
    computes, on all ranks, and nothing is cached on this one.
    """

    def __init__(self, enabled: Enabled) -> None:
        self.enabled = enabled
        enabled.instance.keeps_sessions = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.enabled.call_computing(args, kwargs)


def _copied(
    module: nn.Module, settings: Settings | None, place: str, had_registry: bool, tuned_size: tuple[int, ...]
) -> Any:
    """The value of the attribute `place` in a copy of an enabled module, whose attributes do not exist yet."""
    if settings is None:
        return None if place == CALL else types.MethodType(getattr(type(module), place), module)
    enabled = Enabled(module, settings, settings.backend(), had_registry=had_registry)
    enabled.tuned_size = tuned_size
    if place == CALL:  # `nn.Module` does not copy this attribute.
        module.__dict__[CALL] = enabled
    return enabled


def enabled_of(module: nn.Module) -> Enabled | None:
    """The `Enabled` object of a module; None if there is none, or if something else has replaced it."""
    found: Enabled | None = installed_in(module)
    return found


def uncounted_call(module: nn.Module, method: str, call: Callable[[], Any]) -> Any:
    """Makes a call of a watched method (see `entry_points`)."""
    enabled = enabled_of(module)
    return call() if enabled is None else enabled.uncounted_call(module, method, call)


def _first_tensor(value: Any) -> Any:
    """A prompt may be passed as a list, which may be a new one at every call, with the same tensors."""
    return value[0] if isinstance(value, list | tuple) and value else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
