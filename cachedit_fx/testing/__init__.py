"""For tests and examples of one's own: a check of block templates, and tiny pipelines that need no download."""

from cachedit_fx.testing.pattern_check import PatternCheck, check_pattern
from cachedit_fx.testing.template_reference import UncheckableError
from cachedit_fx.testing.tiny_pipelines import tiny_pipeline

__all__ = ["PatternCheck", "UncheckableError", "check_pattern", "tiny_pipeline"]
