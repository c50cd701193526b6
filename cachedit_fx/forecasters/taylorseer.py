"""Forecasts by TaylorSeer: a Taylor series from backward differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times, distinct
from cachedit_fx.forecasters.forecaster_fields import check_int


@dataclass(frozen=True, kw_only=True)
class TaylorSeerCalibratorConfig(LinearForecaster):
    """Evaluates a Taylor series around the last computed step. Names and meaning are those of cache-dit.

    Let Y be the value at a computed step, w the gap to the previous computed step, and k the time since the step.
    Then d0 = Y, d(i+1) = (d(i) - d(i) of the previous computed step) / w, and forecast = sum of d(i) k^i / i!. The
    order is lower while there are fewer values, so forecasts start after the second computed step.

    Source: arXiv:2503.06923.

    Attributes:
        taylorseer_order: The highest i; one more value than this is stored. 0 repeats the last value.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    taylorseer_order: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("taylorseer_order", self.taylorseer_order, least=0)

    @property
    def depth(self) -> int:
        return self.taylorseer_order + 1

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        elapsed = times.now - times.computed[0]
        indices = distinct(times.computed)
        at = [times.computed[i] for i in indices]
        # Row j holds the factors of d(i) at the j-th computed step; each iteration increases i by one.
        rows = np.eye(len(times.computed))[indices]
        total = rows[0]
        for i in range(1, len(indices)):
            gaps = np.subtract(at[: len(rows) - 1], at[1 : len(rows)])
            rows = (rows[:-1] - rows[1:]) / gaps[:, None]
            total = total + rows[0] * (elapsed**i / math.factorial(i))
        factors: list[float] = total.tolist()
        return factors
