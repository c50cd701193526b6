"""Forecasts by HiCache: TaylorSeer's differences, weighted with Hermite polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.polynomial.hermite import hermval

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.forecasters.forecaster_fields import check_int, check_number
from cachedit_fx.forecasters.taylorseer import sum_of_differences


@dataclass(frozen=True, kw_only=True)
class HiCacheCalibratorConfig(LinearForecaster):
    """Weights the differences of TaylorSeer with Hermite polynomials instead of powers.

    forecast = d(0) + sum over i >= 1 of d(i) sigma^i H_i(sigma k) / i!, where k is the number of steps since the newest
    computed step, d(i) are the differences of TaylorSeer per step, and H_i are the physicists' Hermite polynomials:
    H_0 = 1, H_1 = 2x, H_(i+1) = 2x H_i - 2i H_(i-1). `sigma` scales both the argument and the term ("dual scaling").
    The term of order 1 is 2 sigma^2 times that of TaylorSeer: half of it for a `sigma` of 0.5, all of it for the square
    root of 1/2.

    Source: arXiv:2508.16984, with the default `sigma` of its implementation.

    Attributes:
        order: The highest i; one more value than this is stored. 0 repeats the last value.
        sigma: The contraction factor, between 0 and 1. 0 repeats the last value.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    order: int = 2
    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("order", self.order, least=0)
        check_number("sigma", self.sigma)

    @property
    def depth(self) -> int:
        return self.order + 1

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        return hermite_factors(times, self.sigma)


def hermite_factors(times: Times, sigma: float) -> Sequence[float]:
    """Returns the factor of each computed value in the sum of `HiCacheCalibratorConfig`, newest first."""
    # H_i has terms of several powers, so the unit matters: it is the mean distance of a step since the newest value. If
    # timesteps repeat, that distance is 0.
    elapsed = times.now - times.computed[0]
    unit = elapsed / (len(times.reused) + 1) or 1.0

    def weight(i: int) -> float:
        value = float(hermval(sigma * elapsed / unit, [0.0] * i + [1.0]))
        return (unit * sigma) ** i * value / math.factorial(i)

    return sum_of_differences(times, weight)
