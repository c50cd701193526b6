"""Receives notifications of diffusers: the label of a guidance branch, and the end of a pipeline's call."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from cachedit_fx.runtime.guidance_branch import set_label
from cachedit_fx.runtime.instances import end_generation

_HOOK = "cachedit_fx"
_MISSING = object()


def register_hook(module: nn.Module) -> None:
    """Registers a diffusers hook for its notifications only.

    The hook has no effect around the forward, so it is removed from there. The graph does not change then, and a copy
    of the module does not call the forward of the original.
    """
    from diffusers.hooks.hooks import HookRegistry

    before = module.__dict__.get("forward", _MISSING)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(_HOOK) is None:
        registry.register_hook(_hook_type()(), _HOOK)
        _put_forward(module, before)


def remove_hook(module: nn.Module, *, keep_registry: bool) -> None:
    """Removes the hook, and also the hook registry if it is empty and `keep_registry` is False."""
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
    """Returns the class of the hook, which is notified of the labels of `cache_context` and the end of a call."""
    from diffusers.hooks.hooks import BaseState, ModelHook, StateManager

    class Labels(StateManager):
        """Passes the label to the sessions of this thread, because one transformer may run in several threads."""

        def set_context(self, context: Any) -> None:
            set_label(getattr(context, "name", context))

    class SessionHook(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.labels = Labels(BaseState)  # type: ignore[arg-type]

        def __reduce__(self) -> tuple[Any, ...]:
            return _make_hook, ()  # The class is local, so it cannot be pickled by name.

        def reset_state(self, module: nn.Module) -> nn.Module:
            end_generation(module)
            return module

    return SessionHook
