"""The rule "budget" with probe "timestep": reuse until the error that the magnitudes foretell adds up to the threshold.

Source: MagCache (arXiv:2506.09045). By how much the residual's magnitude changes from step to step hardly depends on
the prompt, so that a calibration run foretells it, and nothing is read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cachedit_fx.policies.history import Decision, History


def by_magnitude(ratios: Sequence[float], threshold: float, history: History) -> Decision:
    """Reuses if the errors of the steps since the last computed one, with its own, add up to less than the threshold.

    A step's error is |1 - the product of the ratios since the last computed step|.

    Args:
        ratios: Per step of the session the residual's magnitude over that of the step before; a step beyond their end
            is computed.
    """
    step = history.number
    if step >= len(ratios):
        return Decision(True, "ratios-end")
    error = abs(1 - math.prod(ratios[step - history.num_continuous : step + 1]))
    total = history.accumulated_diff + error
    if total < threshold:
        return Decision(False, "ratios-below", False, threshold, total)
    return Decision(True, "ratios-above", False, threshold, total)
