"""Shows what the package did: `explain`, `summary`, `report`, pages and dumps. Only `testing` imports this folder."""

from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.inspect.reports import RunReport, report, summary
from cachedit_fx.runtime.call_counts import CallCounts
from cachedit_fx.runtime.stats import CacheStats

__all__ = ["CacheStats", "CallCounts", "Explanation", "RunReport", "explain", "report", "summary"]
