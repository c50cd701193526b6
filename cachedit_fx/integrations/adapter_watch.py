"""Notices that LoRA adapters change: the step after a change computes, also within a generation.

What diffusers and PEFT change is not visible to `frontend/region_watch.py` in all cases: a weight of an adapter is a
number in a dictionary, and a hot-swap writes through `.data`, which leaves no trace on a tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from cachedit_fx.frontend.enabled import enabled_of
from cachedit_fx.frontend.entry_points import WatchedMethod

# The methods of diffusers' `PeftAdapterMixin` that change what a model computes. Pipelines call these, too.
ADAPTER_METHODS = (
    *("load_lora_adapter", "add_adapter", "delete_adapters", "unload_lora"),
    *("set_adapter", "set_adapters", "enable_adapters", "disable_adapters", "enable_lora", "disable_lora"),
    *("fuse_lora", "unfuse_lora"),
)


def watch_adapters(module: nn.Module) -> None:
    """Replaces the methods of a module that change adapters by ones that also make its cached values unusable."""
    for name in ADAPTER_METHODS:
        if isinstance(getattr(type(module), name, None), types.FunctionType):
            module.__dict__.setdefault(name, WatchedMethod(module, name, change_adapters, takes_tensors=False))


def change_adapters(module: nn.Module, _method: str, call: Callable[[], Any]) -> Any:
    """Makes a call that changes the adapters of a module."""
    try:
        return call()
    finally:  # A call that fails may have changed some of the layers.
        enabled = enabled_of(module)
        if enabled is not None:
            enabled.forget_weights()
