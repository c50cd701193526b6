"""When to compute: the rules that decide, and pure functions of the configuration, the history and the diff."""

from cachedit_fx.config.rules import Budget, Magnitude, Rule, Threshold
from cachedit_fx.policies.decide import computes_anyway, decide, decide_unread, decision_terms
from cachedit_fx.policies.decider import Decider, StepView
from cachedit_fx.policies.guided_steps import by_guidance
from cachedit_fx.policies.history import Decision, History, needs_refresh
from cachedit_fx.policies.position import Progress

__all__ = [
    "Budget",
    "Decider",
    "Decision",
    "History",
    "Magnitude",
    "Progress",
    "Rule",
    "StepView",
    "Threshold",
    "by_guidance",
    "computes_anyway",
    "decide",
    "decide_unread",
    "decision_terms",
    "needs_refresh",
]
