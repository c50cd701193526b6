"""The rule "budget" with probe "timestep": steps are reused until their predicted errors add up to the threshold.

Source: MagCache (arXiv:2506.09045). The change of the magnitude of the residual from step to step hardly depends on the
prompt. A calibration run can therefore predict it, and nothing is read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cachedit_fx.policies.history import Decision, History


def by_magnitude(ratios: Sequence[float], threshold: float, history: History) -> Decision:
    """Reuses the step if the predicted errors since the last computed step sum to less than the threshold.

    The sum includes this step. The predicted error of a step is |1 - p|, where p is the product of the ratios since the
    last computed step.

    Args:
        ratios: For each step of the session, the magnitude of the residual divided by that of the previous step. Steps
            beyond the end are computed.
    """
    step = history.number
    if step >= len(ratios):
        return Decision(True, "ratios-end")
    error = abs(1 - math.prod(ratios[step - history.num_continuous : step + 1]))
    total = history.accumulated_diff + error
    if total < threshold:
        return Decision(False, "ratios-below", False, threshold, total)
    return Decision(True, "ratios-above", False, threshold, total)
