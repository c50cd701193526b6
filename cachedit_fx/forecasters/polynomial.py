"""Forecasts by the polynomial through the last computed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times, distinct
from cachedit_fx.forecasters.forecaster_fields import check_int


@dataclass(frozen=True, kw_only=True)
class PolynomialCalibratorConfig(LinearForecaster):
    """Evaluates the polynomial through the last `order` + 1 computed values at their positions (Lagrange).

    A value that changes like a polynomial of this degree is forecast exactly, even if the computed steps are not evenly
    spaced. The differences of TaylorSeer are exact only for straight lines then. With fewer values, the degree is
    lower.

    Attributes:
        order: The degree; `order` + 1 values are stored. 0 repeats the last value.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("order", self.order, least=0)

    @property
    def depth(self) -> int:
        return self.order + 1

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        indices = distinct(times.computed)
        factors = [0.0] * len(times.computed)
        for i in indices:
            factors[i] = 1.0
            for j in indices:
                if j != i:
                    factors[i] *= (times.now - times.computed[j]) / (times.computed[i] - times.computed[j])
        return factors
