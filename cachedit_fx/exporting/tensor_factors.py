"""`Forecaster.numbers` as tensor operations, for the forecasters that have such a form.

The positions are numbers of steps (`by="step"`): distinct, and without a gap between a computed step and the reused
steps after it. The operations are those of `numbers` in float64, so the results are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cachedit_fx.forecasters.foca import FAR, FoCaCalibratorConfig
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig

# (position, factors of the computed values whose sum is the value at this position)
_Point = tuple[Tensor, Tensor]


def numbers_in_tensors(forecaster: Forecaster, computed: Tensor, now: Tensor) -> Tensor:
    """Returns what `numbers` returns, float32.

    Args:
        computed: Positions of the computed steps, newest first, float64 [n].
        now: Position of this step, float64 [].
    """
    numbers = _ages if type(forecaster).numbers is Forecaster.numbers else _NUMBERS[type(forecaster)]
    return numbers(computed, now).float()


def has_tensor_form(forecaster: Forecaster) -> bool:
    """Whether `numbers_in_tensors` and the functions of the forecaster can be part of a graph."""
    has_numbers = type(forecaster) in _NUMBERS or type(forecaster).numbers is Forecaster.numbers
    return has_numbers and forecaster.holds_values and forecaster.by == "step"


def _ages(computed: Tensor, now: Tensor) -> Tensor:
    return now - computed


def _taylorseer(computed: Tensor, now: Tensor) -> Tensor:
    rows = torch.eye(len(computed), dtype=torch.float64, device=computed.device)
    total, elapsed = rows[0], now - computed[0]
    for i in range(1, len(computed)):
        gaps = computed[: len(rows) - 1] - computed[1 : len(rows)]
        rows = (rows[:-1] - rows[1:]) / gaps[:, None]
        total = total + rows[0] * (elapsed**i / math.factorial(i))
    return total


def _polynomial(computed: Tensor, now: Tensor) -> Tensor:
    factors = []
    for i in range(len(computed)):
        factor = torch.ones_like(now)
        for j in range(len(computed)):
            if j != i:
                factor = factor * ((now - computed[j]) / (computed[i] - computed[j]))
        factors.append(factor)
    return torch.stack(factors)


def _foca(computed: Tensor, now: Tensor) -> Tensor:
    rows = torch.eye(len(computed), dtype=torch.float64, device=computed.device)
    points = [(computed[i], rows[i]) for i in range(len(computed))]
    if len(points) == 1:
        return rows[0]
    before = points[1]
    if len(points) > 2:
        before = _walk(points[1], points[2], points[2], computed[0] - 1)
    return _walk(points[0], points[1], before, now)[1]


def _walk(anchor: _Point, anchor_before: _Point, before: _Point, end: Tensor) -> _Point:
    """The forecast at the position `end` after a walk from `anchor` in steps of 1; `anchor` itself if it is `end`.

    See `foca._walk`.
    """
    start, value = anchor
    anchored, num_steps = _slope(anchor, anchor_before), end - start
    last, now, found = before, anchor, value
    for step in range(1, FAR + 1):
        position = start + step
        last, now = now, (position, value + (position - start) / 2 * (anchored + _slope(now, last)))
        found = torch.where(num_steps == step, now[1], found)
    far = value + FAR / num_steps * (now[1] - value)
    return end, torch.where(num_steps > FAR, far, found)


def _slope(now: _Point, before: _Point) -> Tensor:
    return (now[1] - before[1]) / (now[0] - before[0])


_NUMBERS: dict[type[Forecaster], Callable[[Tensor, Tensor], Tensor]] = {
    FoCaCalibratorConfig: _foca,
    PolynomialCalibratorConfig: _polynomial,
    TaylorSeerCalibratorConfig: _taylorseer,
}
FORECASTER_NAMES = tuple(sorted(kind.__name__ for kind in _NUMBERS))
