"""What shows what happened: `explain`, `summary`, `report`, pages, dumps. No other room imports it, but `testing`."""

from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.inspect.reports import RunReport, report, summary
from cachedit_fx.runtime.call_counts import CallCounts
from cachedit_fx.runtime.stats import CacheStats

__all__ = ["CacheStats", "CallCounts", "Explanation", "RunReport", "explain", "report", "summary"]
