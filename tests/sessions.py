"""The statistics of the sessions of a module."""

from __future__ import annotations

from torch import nn

import cachedit_fx


def every_session(module: nn.Module) -> list[cachedit_fx.inspect.CacheStats]:
    """The statistics of all known sessions, finished or running, in the order of their first steps."""
    return cachedit_fx.summary(module, every_generation=True, logging=False)
