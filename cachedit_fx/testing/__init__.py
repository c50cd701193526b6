"""Checks a block template numerically, for users who write their own."""

from cachedit_fx.testing.pattern_check import PatternCheck, check_pattern
from cachedit_fx.testing.template_reference import UncheckableError

__all__ = ["PatternCheck", "UncheckableError", "check_pattern"]
