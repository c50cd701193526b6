"""Forecasts by FoCa (forecast, then calibrate)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times, distinct

# More than this many steps after the last computed one, a forecast is blended with the last computed value.
FAR = 3

# A position, and the factors of the computed values whose sum is the value at this position.
_Point = tuple[float, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class FoCaCalibratorConfig(LinearForecaster):
    """Applies the trapezoidal rule from the last computed step. The name is that of cache-dit.

    Let F be the last computed value, k the time since then, s the slope from the previous computed value to F, and s'
    the slope between the last two values, including forecasts. Then forecast = F + k/2 (s + s'). From the fourth step
    after F on, the forecast of the third step is blended with F, with the weight 3 / (steps since F).

    Each slope is taken over its own gap. If every step was computed, these are the differences of cache-dit. The
    forecasts before F, which s' may need, are computed again from the computed values before them.

    Source: arXiv:2508.16211, in the form of cache-dit.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    @property
    def depth(self) -> int:
        return 3

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        rows = np.eye(len(times.computed))
        computed: list[_Point] = [(times.computed[i], rows[i]) for i in distinct(times.computed)]
        if len(computed) == 1:
            return tuple(rows[0].tolist())
        before = computed[1]
        if len(computed) > 2:
            before = _walk(computed[1], computed[2], computed[2], times.between)
        _, factors = _walk(computed[0], computed[1], before, (*times.reused, times.now))
        return tuple(factors.tolist())


def _walk(anchor: _Point, anchor_before: _Point, before: _Point, positions: Sequence[float]) -> _Point:
    """Returns the last of the forecasts at `positions`, or `anchor` if there are no positions.

    Args:
        anchor: The computed value that the positions follow.
        anchor_before: The computed value before `anchor`.
        before: The value at the step before `anchor`, computed or forecast.
        positions: The positions of the steps after `anchor`, oldest first.
    """
    start, value = anchor
    anchored = _slope(anchor, anchor_before)
    last, now = before, anchor
    for position in positions[:FAR]:
        local = _slope(now, last) if now[0] > last[0] else anchored
        last, now = now, (position, value + (position - start) / 2 * (anchored + local))
    if len(positions) > FAR:
        now = positions[-1], value + FAR / len(positions) * (now[1] - value)
    return now


def _slope(now: _Point, before: _Point) -> NDArray[np.float64]:
    return (now[1] - before[1]) / (now[0] - before[0])
