"""The forecaster of dynamic mode decomposition: a sum of exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachedit_fx.forecasters.fields import check_choice, check_int, check_number
from cachedit_fx.forecasters.forecaster import Forecaster, Times, widened
from cachedit_fx.forecasters.modes import LEAST, dmd_factors

_EVEN = 1e-3  # Relative: timesteps are rounded.
_NOISE = 1e-4  # Relative to the first singular value: what cache-dit drops.


@dataclass(frozen=True, kw_only=True)
class DMDCalibratorConfig(Forecaster):
    """Exponentials through the last evenly spaced values. Names and meaning are cache-dit's.

    The linear map that best takes each value to the next is found in the span of the values, per sample of the batch;
    the forecast is Re(Phi lambda^k b), with Phi and lambda its eigenvectors and eigenvalues, b the newest value in
    their terms, k the time since in units of the spacing (arXiv:1312.0041; Prony's method). A Taylor series of order 1
    stands in where fewer than four values are evenly spaced, and where the forecast is not finite or runs away.

    All of it is done on the values' inner products in float64, so a forecast costs about as much as it takes to read
    them. They are read by the host, which waits for the device.

    Attributes:
        dmd_history: How many values are remembered, 4 or more.
        dmd_rank: How many modes are fitted; 0 for all above 1e-4 of the first singular value, or above what the
            dtype rounds off where that is more.
        dmd_ridge: Added to the singular values before they are inverted.
        dmd_svd_precision: Has no effect: cache-dit's "low", "medium" and "high" name routines for one decomposition.

    Raises:
        ConfigError: A field has a value it cannot have.
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
        """The time since the newest value in units of the last gap, and how many values are as far apart as that."""
        at = times.computed
        gap = at[0] - at[1] if len(at) > 1 else 0.0
        if gap <= 0:
            return 0.0, 1.0
        tail = 2
        while tail < len(at) and abs(at[tail - 1] - at[tail] - gap) <= _EVEN * gap:
            tail += 1
        return (times.now - at[0]) / gap, float(tail)

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        newest = widened(history[0])
        if len(history) < LEAST:  # A Taylor series, as in `dmd_factors`.
            before = widened(history[min(1, len(history) - 1)])
            line: torch.Tensor = newest + numbers[0] * (newest - before)
            return line.to(history[0].dtype)
        noise = max(_NOISE, torch.finfo(history[0].dtype).eps)
        factors = dmd_factors(inner_products(history), numbers, self.dmd_rank, self.dmd_ridge, noise)
        shape = (-1, *(1,) * (newest.dim() - 1))
        total = factors[:, 0].view(shape) * newest
        for i in range(1, len(history)):
            factor = factors[:, i].view(shape)
            # What has no part may be infinite: then a line was put through the newest two.
            total = total + (factor * widened(history[i])).masked_fill(factor == 0, 0.0)
        found: torch.Tensor = total.view(newest.shape).to(history[0].dtype)
        return found


def inner_products(history: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All inner products of the values, [B, n, n], float64; a value of less than three axes is a single sample.

    One sum for each pair, so that Inductor reads every value once and writes no copy in float64.
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
