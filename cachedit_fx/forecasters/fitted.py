"""Forecasts with factors that `tune` fits to recorded runs, for one schedule of computed steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.forecasters.forecaster_fields import check_int
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig

_LINE = PolynomialCalibratorConfig(order=1)


@dataclass(frozen=True, kw_only=True)
class FittedCalibratorConfig(LinearForecaster):
    """Sums the last computed values, with separate factors for every step of one schedule.

    The factors of a polynomial follow from the positions of the values. These factors are fitted to what the model
    returned: for each step, by ordinary linear regression on the last `memory` computed values. They are valid for the
    schedule that they were fitted to. If other steps were computed before a step, it is forecast by a straight line.

    Attributes:
        memory: The largest number of computed values in a sum.
        computed: The numbers of the steps that the schedule computes, in ascending order. Empty if nothing was fitted
            yet; only `tune` can fit.
        factors: For each step, the factor of each value, newest first. The factors of a computed step are used to
            judge how good the forecast of this step would have been; without them, it is not judged.
        guided: The computed steps at which the second guidance branch uses the difference from the first one
            (`guidance_reuse`). The factors of such a step are fitted to the differences at the steps before it that
            both branches compute.

    Raises:
        ConfigError: The value of a field is not allowed, or `by` is not "step".
    """

    memory: int = 3
    computed: Sequence[int] = ()
    factors: Sequence[Sequence[float]] = ()
    guided: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("memory", self.memory, least=1)
        if self.by != "step":
            raise ConfigError(f"cachedit_fx: by must be 'step', because factors belong to steps, got {shown(self.by)}")
        lists: dict[str, Any] = {"computed": self.computed, "factors": self.factors, "guided": self.guided}
        for name, value in lists.items():
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ConfigError(f"cachedit_fx: {name} must be a list, one entry per step, got {shown(value)}")
        rows = [tuple(row) if isinstance(row, Sequence) else (math.nan,) for row in lists["factors"]]
        if not all(len(row) <= self.memory and all(map(_is_finite, row)) for row in rows):
            raise ConfigError(
                f"cachedit_fx: factors must be lists of at most memory={self.memory} finite numbers, got "
                f"{shown(self.factors)}"
            )
        object.__setattr__(self, "computed", tuple(self.computed))
        object.__setattr__(self, "factors", tuple(rows))
        object.__setattr__(self, "guided", tuple(self.guided))

    @property
    def depth(self) -> int:
        return self.memory

    def forecasts_from(self, count: int) -> bool:
        return True

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        count, step = len(times.computed), round(times.now)
        left_out = self.guided if step in self.guided else ()
        before = [number for number in self.computed if number < step and number not in left_out][::-1][:count]
        row = self.factors[step] if step < len(self.factors) else ()
        is_as_fitted = [round(position) for position in times.computed] == before
        if is_as_fitted and not row and step in self.computed:
            row = (1.0,)  # The last value itself. `verdict.judge` treats it as neither better nor worse.
        if not row or len(row) > count or not is_as_fitted:
            return [*_LINE.numbers(Times(times.computed[:2], times.now)), *[0.0] * (count - 2)]
        return [*row, *[0.0] * (count - len(row))]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
