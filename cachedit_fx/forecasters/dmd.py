"""Forecasts by dynamic mode decomposition: a sum of exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cachedit_fx.forecasters.forecaster import Forecaster, Times, widened
from cachedit_fx.forecasters.forecaster_fields import check_choice, check_int, check_number
from cachedit_fx.forecasters.modes import LEAST, dmd_factors, factors_of

_EVEN = 1e-3  # Relative tolerance for equal gaps, because timesteps are rounded.
_NOISE = 1e-4  # cache-dit drops the singular values below this fraction of the first one.


@dataclass(frozen=True, kw_only=True)
class DMDCalibratorConfig(Forecaster):
    """Fits exponentials to the last evenly spaced values. Names and meaning are those of cache-dit.

    For each sample of the batch, the linear map that best maps each value to the next one is computed in the span of
    the values. The forecast is Re(Phi lambda^k b): Phi and lambda are the eigenvectors and eigenvalues of the map, b
    are the coefficients of the newest value in terms of Phi, and k is the time since the newest value in units of the
    spacing (arXiv:1312.0041; Prony's method). A Taylor series of order 1 is used instead if fewer than four values are
    evenly spaced, if the forecast is not finite, or if it is implausibly far from the newest value.

    The computation uses only the inner products of the values, in float64, so a forecast costs about as much as
    reading the values. They are computed once after each computed step. The host reads them at the next one, when the
    device has long computed them.

    Attributes:
        dmd_history: The number of values that are stored, at least 4.
        dmd_rank: The number of modes that are fitted. 0 fits all modes whose singular value exceeds 1e-4 of the first
            one (or the rounding error of the dtype, if that is larger).
        dmd_ridge: Added to the singular values before they are inverted.
        dmd_svd_precision: Has no effect. cache-dit's "low", "medium" and "high" select different routines for the same
            decomposition.

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    dmd_history: int = 6
    dmd_rank: int = 0
    dmd_ridge: float = 1e-8
    dmd_svd_precision: str = "medium"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("dmd_history", self.dmd_history, least=LEAST)
        check_int("dmd_rank", self.dmd_rank, least=0)
        check_number("dmd_ridge", self.dmd_ridge)
        check_choice("dmd_svd_precision", self.dmd_svd_precision, ("low", "medium", "high"))

    @property
    def depth(self) -> int:
        return self.dmd_history

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the time since the newest value in units of the last gap, and the number of evenly spaced values."""
        at = times.computed
        gap = at[0] - at[1] if len(at) > 1 else 0.0
        if gap <= 0:
            return 0.0, 1.0
        tail = 2
        while tail < len(at) and abs(at[tail - 1] - at[tail] - gap) <= _EVEN * gap:
            tail += 1
        return (times.now - at[0]) / gap, float(tail)

    def _summary(self, history: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        return inner_products(history).flatten() if len(history) >= LEAST else None

    def _numbers_of(self, times: Times, summary: Sequence[float], dtype: torch.dtype) -> Sequence[float]:
        """Returns the factor of each value for each sample, newest first."""
        (horizon, tail), count = self.numbers(times), len(times.computed)
        products = np.array(summary).reshape(-1, count, count)
        rows = factors_of(products, horizon, int(tail), self.dmd_rank, self.dmd_ridge, _noise(dtype))
        factors: list[float] = rows.ravel().tolist()
        return factors

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        newest = widened(history[0])
        if len(history) < LEAST:  # A Taylor series, as in `dmd_factors`.
            before = widened(history[min(1, len(history) - 1)])
            line: torch.Tensor = newest + numbers[0] * (newest - before)
            return line.to(history[0].dtype)
        if numbers.numel() == 2:
            noise = _noise(history[0].dtype)
            factors = dmd_factors(inner_products(history), numbers, self.dmd_rank, self.dmd_ridge, noise)
        else:
            factors = numbers.view(-1, len(history))
        shape = (-1, *(1,) * (newest.dim() - 1))
        total = factors[:, 0].view(shape) * newest
        for i in range(1, len(history)):
            factor = factors[:, i].view(shape)
            # A value with the factor 0 may be infinite: the forecast is then a line through the newest two values.
            total = total + (factor * widened(history[i])).masked_fill(factor == 0, 0.0)
        found: torch.Tensor = total.view(newest.shape).to(history[0].dtype)
        return found


def _noise(dtype: torch.dtype) -> float:
    return max(_NOISE, torch.finfo(dtype).eps)


def inner_products(history: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns all inner products of the values, [B, n, n], float64.

    A value with fewer than three dimensions counts as a single sample. Each pair is a sum of its own, so that Inductor
    reads every value once and writes no float64 copy.
    """
    rows = [value.double() for value in history]
    batched = rows[0].dim() > 2
    axes = tuple(range(1 if batched else 0, rows[0].dim()))
    found: dict[tuple[int, int], torch.Tensor] = {}
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            found[i, j] = found[j, i] = (one * other).sum(axes).view(-1)
    pairs = torch.stack([found[i, j] for i in range(len(rows)) for j in range(len(rows))], dim=-1)
    return pairs.view(-1, len(rows), len(rows))
