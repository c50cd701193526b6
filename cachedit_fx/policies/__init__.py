"""When to compute: pure functions of the configuration, what happened so far, and the diff."""

from cachedit_fx.policies.decide import decide
from cachedit_fx.policies.decider import Decider, StepView
from cachedit_fx.policies.history import Decision, History, needs_refresh

__all__ = ["Decider", "Decision", "History", "StepView", "decide", "needs_refresh"]
