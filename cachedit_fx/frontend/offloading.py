"""Calls of a model whose hooks move its weights: the hooks are left out, and each piece moves the weights it reads."""

from __future__ import annotations

import contextlib
import logging
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import PassError, PatternError
from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.backend import Backend, RefusedError
from cachedit_fx.frontend.capture_strategies import CAPTURE_ERRORS, CaptureStrategies, signature_of
from cachedit_fx.frontend.torch_internals import BackendCompilerFailed, FailOnRecompileLimitHit
from cachedit_fx.frontend.uncached import WhyUncached, why_not_without_hooks
from cachedit_fx.frontend.weight_hooks import (
    WeightHooks,
    after_call,
    before_call,
    find_weight_hooks,
    has_only_casts,
    is_with_casts,
    plain_forward,
    with_casts,
)
from cachedit_fx.runtime.model_call import ModelCall, within_call
from cachedit_fx.runtime.placement import Placement

log = logging.getLogger(__name__)

MAX_REFUSED = 256
_MIB = 2**20
_FORWARD = "_cachedit_fx_forward"  # Holds the forward of the model during a call.
_MISSING = object()


class NotCompiledError(Exception):
    """The forward of a model without its hooks was about to run uncompiled, where its weights are missing."""


def _compiled_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model without its hooks. Dynamo replaces it by the graph, which moves the weights."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiledError
    return vars(self)[_FORWARD](*args, **kwargs)


class HookFreeForwards:
    """Leaves the known hooks of a model out of its forward. The same hooks always give the same functions."""

    def __init__(self) -> None:
        self._casting: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self.placement = Placement()

    @contextlib.contextmanager
    def without_hooks(self, model: nn.Module, hooks: WeightHooks) -> Iterator[None]:
        """In the block, the model can only be called through a compiled graph.

        Raises:
            RefusedError: A weight is of a class that stand-ins cannot have.
        """
        weights = [*hooks.weights(model)]
        kinds = {type(holder[name]) for _, holder, name in weights} - {torch.Tensor, nn.Parameter}
        if kinds:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise RefusedError(why_not_without_hooks(model, f"weights of the class {names}"))
        before: list[tuple[dict[str, Any], str, Any]] = []

        def put(module: nn.Module, name: str, value: Any) -> None:
            held = vars(module)
            before.append((held, name, held.get(name, _MISSING)))
            _put(held, name, value)

        try:
            for module in {**hooks.hooked, **hooks.casts}:
                put(module, "forward", self._forward_of(module, hooks))
            put(model, _FORWARD, model.forward)
            put(model, "forward", types.MethodType(_compiled_forward, model))
            with self.placement.stand_ins(weights):
                yield
        finally:
            for held, name, value in reversed(before):
                _put(held, name, value)

    def _forward_of(self, module: nn.Module, hooks: WeightHooks) -> Any:
        dtype = hooks.casts.get(module)
        if dtype is not None:
            known = self._casting.get(module)
            if known is None or known.args[1] != dtype:
                known = self._casting[module] = with_casts(module, dtype)
            return known
        plain = plain_forward(module)
        is_of_class = getattr(plain, "__func__", None) is type(module).forward
        return _MISSING if is_of_class else plain


def _put(held: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        held.pop(name, None)
    else:
        held[name] = value


class OffloadedCalls:
    """Makes the calls of one model whose hooks move weights."""

    def __init__(self, module: nn.Module, backend: Backend, compile_kwargs: Mapping[str, Any]) -> None:
        self._lock, self._has_begun = released_in_child(threading.RLock()), False
        self._forwards = HookFreeForwards()
        self._refused: dict[Hashable, WhyUncached] = {}
        self._compiled = CaptureStrategies(
            module, backend.offloaded(), {**compile_kwargs, "fullgraph": True}, may_break=False
        )
        self._is_memory_reported = False

    def turn(self, *, begin: bool = False) -> contextlib.AbstractContextManager[Any]:
        """A lock for one call, since a weight is in one place at a time. Calls take no turns before the first one.

        Args:
            begin: Whether hooks on the model move its weights.
        """
        self._has_begun = self._has_begun or begin
        return self._lock if self._has_begun else contextlib.nullcontext()

    def __call__(
        self, model: nn.Module, hooks: WeightHooks, call: ModelCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of the model; or why it has to be called with its hooks, None if Dynamo is turned off.

        Nothing of the model has run in the latter case.
        """
        key = self._key(model, hooks, args, kwargs)
        if key in self._refused:
            return Refusal(self._refused[key])
        try:
            return self._call(model, hooks, call, args, kwargs)
        except NotCompiledError:
            return Refusal(None)
        except RefusedError as error:
            why = error.why
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, PatternError | PassError):
                raise inner from None
            if not isinstance(inner, RefusedError):
                raise
            why = inner.why
        except FailOnRecompileLimitHit:
            why = why_not_without_hooks(model, "a call that needs one graph more than Dynamo's recompile limit allows")
        except CAPTURE_ERRORS as error:
            why = why_not_without_hooks(model, self._compiled.describe(error))
        if len(self._refused) >= MAX_REFUSED:
            self._refused.clear()
        self._refused[key] = why
        return Refusal(why)

    def _call(
        self, model: nn.Module, hooks: WeightHooks, call: ModelCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        returned: list[tuple[Any, Any]] = []
        for hook in hooks.at_model:
            args, kwargs, device = before_call(model, hook, args, kwargs)
            returned.append((hook, device))
        placement = self._forwards.placement
        with self._forwards.without_hooks(model, hooks):
            call.placement = placement
            try:
                output = placement.without_stand_ins(self._compiled(*args, **kwargs))
                call.is_offloaded = True
            finally:
                call.placement = None
        for hook, device in reversed(returned):
            output = after_call(hook, output, device)
        self._report_memory(type(model).__name__, placement)
        return output

    def _key(self, model: nn.Module, hooks: WeightHooks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        weight = next(model.parameters(), None)
        grad = torch.is_grad_enabled() and weight is not None and weight.requires_grad
        state = (model.training, grad, torch.is_inference_mode_enabled(), tuple(map(id, hooks.hooked)))
        return (*state, signature_of(args, kwargs))

    def _report_memory(self, name: str, placement: Placement) -> None:
        """Warns once if the pieces need more memory for weights than the hooks alone."""
        if self._is_memory_reported or placement.most_bytes <= placement.most_bytes_of_hooks:
            return
        self._is_memory_reported = True
        log.warning(
            "cachedit_fx: %s has up to %.3g MiB of its weights on the device at a time, its hooks alone %.3g MiB.\n"
            "Why: the weights that one compiled piece reads (a block) are moved together, not layer by layer.\n"
            "What to do: nothing if it fits; to need less, use smaller groups of blocks or do not cache this model.",
            name,
            placement.most_bytes / _MIB,
            placement.most_bytes_of_hooks / _MIB,
        )


def captured_without_hooks(
    model: nn.Module, compiled: CaptureStrategies, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Lets Dynamo capture a model as `OffloadedCalls` does. Returns False if the model has to run with its hooks.

    The compiled code must raise an exception before it runs anything.
    """
    hooks, forwards, call = find_weight_hooks(model), HookFreeForwards(), ModelCall(None, None)
    if not hooks.hooked or hooks.obstacle:
        return False
    for hook in hooks.at_model:
        args, kwargs, _ = before_call(model, hook, args, kwargs)
    call.placement = forwards.placement
    try:
        with forwards.without_hooks(model, hooks), within_call(call):
            compiled(*args, **kwargs)
    except (NotCompiledError, RefusedError, FailOnRecompileLimitHit, *CAPTURE_ERRORS) as error:
        if isinstance(error, BackendCompilerFailed):
            raise
        return False
    return True


class Refusal:
    """Why a call has to be made with the hooks; `why` is None if the reason is not known."""

    __slots__ = ("why",)

    def __init__(self, why: WhyUncached | None) -> None:
        self.why = why


class Casts:
    """Replaces layerwise casting hooks by forwards that Dynamo can capture.

    Layers with other hooks keep theirs. Their casts are left out with the other hooks (`HookFreeForwards`), if at all.
    """

    def __init__(self) -> None:
        self._before: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def replace(self, hooks: WeightHooks) -> None:
        for layer, dtype in hooks.casts.items():
            before = vars(layer).get("forward")
            if before is None or is_with_casts(before) or not has_only_casts(layer) or plain_forward(layer) is None:
                continue
            self._before[layer] = before
            vars(layer)["forward"] = with_casts(layer, dtype)

    def restore(self) -> None:
        for layer, before in self._before.items():
            if is_with_casts(vars(layer).get("forward")):
                vars(layer)["forward"] = before
        self._before.clear()


@contextlib.contextmanager
def without_casting_hooks(model: nn.Module) -> Iterator[None]:
    """In the block, the casting hooks that `Casts` can replace are replaced."""
    casts = Casts()
    casts.replace(find_weight_hooks(model))
    try:
        yield
    finally:
        casts.restore()
