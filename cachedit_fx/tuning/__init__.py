"""Finds which steps to compute for a target quality or speed-up, from a few calls of a pipeline."""

from cachedit_fx.integrations.signature import check_signature
from cachedit_fx.tuning.points import Alternative, Point, Quality
from cachedit_fx.tuning.saved import load_tuned
from cachedit_fx.tuning.tune import tune
from cachedit_fx.tuning.tuning_result import TuneResult

__all__ = ["Alternative", "Point", "Quality", "TuneResult", "check_signature", "load_tuned", "tune"]
