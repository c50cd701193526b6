"""What the compiler makes of a model, and why: `explain`."""

from cachedit_fx.explanation.explain import explain
from cachedit_fx.explanation.result import Explanation

__all__ = ["Explanation", "explain"]
