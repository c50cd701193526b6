"""The rule "budget": steps are reused until the changes from step to step add up to the threshold.

Source: TeaCache (arXiv:2411.19108), whose polynomial estimates the change of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachedit_fx.policies.history import Decision, History


def by_budget(coefficients: Sequence[float], threshold: float, history: History, diff: float) -> Decision:
    """Reuses the step if the changes since the last computed step, including this one, sum to less than the threshold.

    Args:
        coefficients: The polynomial that is applied to each change, highest power first; empty for none.
        diff: The relative L1 change of the probe since the previous step, dimensionless, >= 0 or NaN.
    """
    total = history.accumulated_diff + rescaled(coefficients, diff)
    if total != total:
        return Decision(True, "nan", True, threshold, total)
    if total < threshold:
        return Decision(False, "budget-below", True, threshold, total)
    return Decision(True, "budget-above", True, threshold, total)


def rescaled(coefficients: Sequence[float], diff: float) -> float:
    """The value of the polynomial at `diff`; NaN if `diff` is NaN."""
    if not coefficients:
        return diff
    value = 0.0
    for coefficient in coefficients:
        value = value * diff + coefficient
    return value
