"""The rule "budget": reuse until the diffs from step to step add up to the threshold.

Source: TeaCache (arXiv:2411.19108), whose polynomial turns the change of the modulated input into that of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachedit_fx.policies.history import Decision, History


def by_budget(coefficients: Sequence[float], threshold: float, history: History, diff: float) -> Decision:
    """Reuses if the diffs since the last computed step, with this one's, add up to less than the threshold.

    Args:
        coefficients: Polynomial that a diff goes through first, highest power first; empty to take it as it is.
        diff: Relative L1 distance from the step before, dimensionless, >= 0 or NaN.
    """
    total = history.accumulated_diff + rescaled(coefficients, diff)
    if total != total:
        return Decision(True, "nan", True, threshold, total)
    if total < threshold:
        return Decision(False, "budget-below", True, threshold, total)
    return Decision(True, "budget-above", True, threshold, total)


def rescaled(coefficients: Sequence[float], diff: float) -> float:
    """The polynomial's value; NaN wherever the diff is."""
    if not coefficients:
        return diff
    value = 0.0
    for coefficient in coefficients:
        value = value * diff + coefficient
    return value
