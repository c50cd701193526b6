"""Modules with a cache whose calls can be served by fast dispatch, and a record of the calls that were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import cachedit_fx
from cachedit_fx.frontend.fast_dispatch import NOT_SERVED
from cachedit_fx.runtime.instances import end_generation
from tests import tiny


def enabled(module: nn.Module, **others: Any) -> nn.Module:
    return cachedit_fx.enable_cache(module, **tiny.fields(**others), inner_backend="eager")


def warm(module: nn.Module, **others: Any) -> nn.Module:
    """The module with the cache enabled, after one generation."""
    tiny.generate(enabled(module, **others), tiny.prompt(), tiny.latents())
    end_generation(module)
    return module


@contextmanager
def served(module: nn.Module) -> Iterator[list[bool]]:
    """Records for every call inside the context whether it was served without Dynamo."""
    calls: list[bool] = []
    dispatcher = module._compiled_call_impl.fast_dispatch

    class Watched:
        def __call__(self, args: Any, kwargs: Any) -> Any:
            result = dispatcher(args, kwargs)
            calls.append(result is not NOT_SERVED)
            return result

        learn = staticmethod(dispatcher.learn)

    module._compiled_call_impl.fast_dispatch = Watched()
    try:
        yield calls
    finally:
        module._compiled_call_impl.fast_dispatch = dispatcher


def last(module: nn.Module) -> cachedit_fx.inspect.CacheStats:
    return cachedit_fx.summary(module, logging=False)[-1]


def reason(module: nn.Module) -> str:
    """Why the calls of the module go through Dynamo."""
    found: str = module._compiled_call_impl.fast_dispatch.reason
    return found
