"""TaylorSeer with the start of cache-dit 1.5.3, to measure what the start changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachedit_fx.forecasters import TaylorSeerCalibratorConfig, Times

FIRST = 3  # The first step, counted from 0, at which cache-dit has a derivative.


@dataclass(frozen=True, kw_only=True)
class LateTaylorSeer(TaylorSeerCalibratorConfig):
    """Has no derivative at the first three steps of a generation.

    cache-dit creates the state of TaylorSeer when the first step ends, so the state counts the second step as its step
    0, and it takes no derivative before its step 2. A step that is computed before the fourth one therefore has only
    its value, and each derivative of a higher order begins one computed step later.

    Attributes:
        late: Whether the start is that of cache-dit; False for that of this package.
        judged: Whether a forecast is compared with the last value, as this package does, or always used, as in
            cache-dit.
    """

    late: bool = True
    judged: bool = False

    @property
    def holds_values(self) -> bool:
        return self.judged

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value, newest first."""
        if not self.late:
            return super().numbers(times)
        order = sum(position >= FIRST for position in times.computed)
        used = replace(times, computed=times.computed[: order + 1])
        return [*super().numbers(used), *[0.0] * (len(times.computed) - len(used.computed))]
