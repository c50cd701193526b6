"""Forecasts by Spectrum: Chebyshev polynomials, fitted by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import NDArray

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times, distinct
from cachedit_fx.forecasters.forecaster_fields import check_int, check_number


@dataclass(frozen=True, kw_only=True)
class SpectrumCalibratorConfig(LinearForecaster):
    """Fits Chebyshev polynomials to the last `memory` values by ridge regression.

    Let tau = 2 t / horizon - 1 for a position t, Phi the matrix of T_0(tau) to T_order(tau) with a row per value, and
    H the values. Then the coefficients are C = (Phi^T Phi + ridge I)^-1 Phi^T H, and the forecast is phi(now) C. It is
    averaged with the line through the last two values; `blend` is the weight of the polynomial.

    The regression is linear in the values, so the forecast is a sum of them, with factors that follow from their
    positions. The coefficients are not stored.

    Source: arXiv:2603.01623, with the defaults of its implementation, except that it fits all values of a generation
    (up to 100).

    Attributes:
        order: The highest degree.
        memory: The largest number of values in the regression, at least 2. All of them are stored.
        ridge: The regularization of the coefficients.
        horizon: The position that is mapped to tau = 1: the number of steps of a generation, or, if `by` is "timestep",
            the distance that the timestep moves during a generation. A step beyond it is itself mapped to tau = 1,
            because the polynomials grow fast outside -1 to 1.
        blend: The weight of the polynomial, from 0 (the line alone) to 1.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    order: int = 4
    memory: int = 5
    ridge: float = 0.1
    horizon: float = 50.0
    blend: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("order", self.order, least=0)
        check_int("memory", self.memory, least=2)
        for field in ("ridge", "horizon", "blend"):
            check_number(field, getattr(self, field))

    @property
    def depth(self) -> int:
        return self.memory

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        indices = distinct(times.computed)
        at = np.array([times.computed[i] for i in indices])
        fitted = self._fit(at, times.now)
        line = np.eye(len(at))[0]
        if len(at) > 1:
            slope = (times.now - at[0]) / (at[0] - at[1])
            line[:2] = 1 + slope, -slope
        factors = np.zeros(len(times.computed))
        factors[indices] = self.blend * fitted + (1 - self.blend) * line
        found: list[float] = factors.tolist()
        return found

    def _fit(self, at: NDArray[np.float64], now: float) -> NDArray[np.float64]:
        """Returns the factors of the regression, by least squares with a row sqrt(ridge) per coefficient."""
        horizon = max(self.horizon, now) or 1.0
        rows = chebvander(2 * at / horizon - 1, self.order)
        padded = np.concatenate([rows, np.sqrt(self.ridge) * np.eye(self.order + 1)])
        inverse = np.linalg.pinv(padded)[:, : len(at)]
        found: NDArray[np.float64] = chebvander(np.array([2 * now / horizon - 1]), self.order)[0] @ inverse
        return found
