"""Caching for compiled diffusion transformers, inside the graph: `torch.compile(model, backend="cachedit")`.

The terms that the code and the documentation use are defined in docs/glossary.md.

This module exports the names of everyday use. The others are exported by the modules of their topic:
`cachedit_fx.config`, `errors`, `exporting`, `forecasters`, `functors`, `inspect`, `integrations`, `patterns`,
`policies`, `testing` and `tuning`.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from cachedit_fx._version import __version__ as __version__
from cachedit_fx.config.cache_config import CacheConfig, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.steps_mask import steps_mask
from cachedit_fx.errors import NoMatchError
from cachedit_fx.exporting import export
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.inspect import dumps as _dumps  # noqa: F401 - It registers itself.
from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.reports import report, summary
from cachedit_fx.integrations.block_adapter import BlockAdapter, ParamsModifier
from cachedit_fx.integrations.config_files import load_configs
from cachedit_fx.integrations.pipelines import disable_cache, enable_cache, refresh_context
from cachedit_fx.patterns import BlockTemplate, register_pattern
from cachedit_fx.patterns.forward_pattern import ForwardPattern
from cachedit_fx.runtime.instances import is_cached, reset
from cachedit_fx.runtime.request import session
from cachedit_fx.saving import load_compiled, save_compiled
from cachedit_fx.tuning import tune

__all__ = [
    "Backend",
    "BlockAdapter",
    "BlockTemplate",
    "CacheConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "ForwardPattern",
    "NoMatchError",
    "ParamsModifier",
    "disable_cache",
    "enable_cache",
    "explain",
    "export",
    "is_cached",
    "load_compiled",
    "load_configs",
    "refresh_context",
    "register_pattern",
    "report",
    "reset",
    "save_compiled",
    "session",
    "steps_mask",
    "summary",
    "tune",
]

# Names that this module exported up to version 0.1, and the modules that export them now.
_MOVED = {
    "config": ("RECOMMENDED", "BasicCacheConfig", "CacheType"),
    "errors": ("ConfigError", "PassError", "PatternError"),
    "forecasters": (
        "DMDCalibratorConfig",
        "FittedCalibratorConfig",
        "FoCaCalibratorConfig",
        "Forecaster",
        "LinearForecaster",
        "PolynomialCalibratorConfig",
        "TaylorSeerCalibratorConfig",
        "Times",
        "register_forecaster",
        "unregister_forecaster",
    ),
    "functors": ("PatchFunctor", "block_nodes", "give_to_block", "rename_stream", "split_stream"),
    "inspect": ("CacheStats", "CallCounts", "Explanation", "RunReport"),
    "integrations": ("BlockAdapterRegistry",),
    "patterns": ("unregister_pattern",),
    "policies": ("Decider", "StepView"),
    "tuning": ("TuneResult", "check_signature", "load_tuned"),
}


def __getattr__(name: str) -> Any:
    for room, names in _MOVED.items():
        if name in names:
            module = f"{__name__}.{room}"
            warnings.warn(
                f"cachedit_fx.{name} has moved to {module}.{name}; the old name will be removed in the next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
