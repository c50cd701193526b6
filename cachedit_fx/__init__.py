"""Caching for compiled diffusion transformers, inside the graph: `torch.compile(model, backend="cachedit")`.

The terms that the code and the documentation use are defined in docs/glossary.md.
"""

from cachedit_fx._version import __version__ as __version__
from cachedit_fx.config.cache_config import RECOMMENDED, CacheConfig, CacheType, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.steps_mask import steps_mask
from cachedit_fx.errors import ConfigError, NoMatchError, PassError, PatternError
from cachedit_fx.forecasters import (
    DMDCalibratorConfig,
    FittedCalibratorConfig,
    FoCaCalibratorConfig,
    Forecaster,
    LinearForecaster,
    PolynomialCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
    register_forecaster,
    unregister_forecaster,
)
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.functors.functor import PatchFunctor, block_nodes, give_to_block, rename_stream, split_stream
from cachedit_fx.inspect import dumps as _dumps  # noqa: F401 - It registers itself.
from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.inspect.reports import RunReport, report, summary
from cachedit_fx.integrations.adapter_registry import BlockAdapterRegistry
from cachedit_fx.integrations.block_adapter import BlockAdapter, ParamsModifier
from cachedit_fx.integrations.config_files import load_configs
from cachedit_fx.integrations.pipelines import disable_cache, enable_cache, refresh_context
from cachedit_fx.patterns import BlockTemplate, register_pattern, unregister_pattern
from cachedit_fx.patterns.forward_pattern import ForwardPattern
from cachedit_fx.policies import Decider, StepView
from cachedit_fx.runtime.call_counts import CallCounts
from cachedit_fx.runtime.instances import is_cached, reset
from cachedit_fx.runtime.request import session
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.tuning import TuneResult, check_signature, load_tuned, tune

BasicCacheConfig = DBCacheConfig  # cache-dit has both names.

__all__ = [
    "RECOMMENDED",
    "Backend",
    "BasicCacheConfig",
    "BlockAdapter",
    "BlockAdapterRegistry",
    "BlockTemplate",
    "CacheConfig",
    "CacheStats",
    "CacheType",
    "CallCounts",
    "ConfigError",
    "DBCacheConfig",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "Decider",
    "Explanation",
    "FittedCalibratorConfig",
    "FoCaCalibratorConfig",
    "Forecaster",
    "ForwardPattern",
    "LinearForecaster",
    "NoMatchError",
    "ParamsModifier",
    "PassError",
    "PatchFunctor",
    "PatternError",
    "PolynomialCalibratorConfig",
    "RunReport",
    "StepView",
    "TaylorSeerCalibratorConfig",
    "Times",
    "TuneResult",
    "block_nodes",
    "check_signature",
    "disable_cache",
    "enable_cache",
    "explain",
    "give_to_block",
    "is_cached",
    "load_configs",
    "load_tuned",
    "refresh_context",
    "register_forecaster",
    "register_pattern",
    "rename_stream",
    "report",
    "reset",
    "session",
    "split_stream",
    "steps_mask",
    "summary",
    "tune",
    "unregister_forecaster",
    "unregister_pattern",
]
