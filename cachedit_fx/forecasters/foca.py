"""The forecaster of FoCa: forecast, then calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times, distinct

# Beyond so many steps since the last computed one, forecasts turn back towards it.
_FAR = 3

# A position, and the factors that make the value there out of the computed ones.
_Point = tuple[float, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class FoCaCalibratorConfig(LinearForecaster):
    """The trapezoidal rule from the last computed step. The name is cache-dit's.

    With F the last computed value, k the time since, s its slope from the computed value before, and s' the slope
    between the last two values, forecasts included: forecast = F + k/2 (s + s'). From the fourth step after F on, the
    forecast of the third is blended with F, 3 / (steps since F) of it.

    Slopes are each over their own gap; where every step was computed these are cache-dit's differences. The forecasts
    before F, which s' may need, are made anew from the computed values behind them.

    Source: arXiv:2508.16211, in cache-dit's form.

    Raises:
        ConfigError: A field has a value it cannot have.
    """

    @property
    def depth(self) -> int:
        return 3

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """The factor of each computed value, newest first."""
        rows = np.eye(len(times.computed))
        known: list[_Point] = [(times.computed[i], rows[i]) for i in distinct(times.computed)]
        if len(known) == 1:
            return tuple(rows[0].tolist())
        before = known[1]
        if len(known) > 2:
            before = _walk(known[1], known[2], known[2], times.between)
        _, factors = _walk(known[0], known[1], before, (*times.reused, times.now))
        return tuple(factors.tolist())


def _walk(anchor: _Point, anchor_before: _Point, before: _Point, positions: Sequence[float]) -> _Point:
    """The last of the forecasts at `positions`, which follow the computed value `anchor`; itself where there are none.

    Args:
        anchor_before: The computed value before `anchor`.
        before: The value at the step before `anchor`, whether computed or forecast.
    """
    start, value = anchor
    anchored = _slope(anchor, anchor_before)
    last, now = before, anchor
    for position in positions[:_FAR]:
        local = _slope(now, last) if now[0] > last[0] else anchored
        last, now = now, (position, value + (position - start) / 2 * (anchored + local))
    if len(positions) > _FAR:
        now = positions[-1], value + _FAR / len(positions) * (now[1] - value)
    return now


def _slope(now: _Point, before: _Point) -> NDArray[np.float64]:
    return (now[1] - before[1]) / (now[0] - before[0])
