"""Forecasts by FreqCa: low frequencies repeat their last value, high frequencies are forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachedit_fx.forecasters.forecaster import Forecaster, Times, widened
from cachedit_fx.forecasters.forecaster_fields import check_int, check_number
from cachedit_fx.forecasters.hicache import hermite_factors


@dataclass(frozen=True, kw_only=True)
class FreqCaCalibratorConfig(Forecaster):
    """Repeats the low frequencies of the last value, and forecasts its high frequencies like HiCache.

    A frequency is one of the discrete Fourier transform along the tokens: the last but one axis, in the order in which
    the model has flattened them. The model's graph does not say which of them are neighbors in an image or in a video,
    nor which belong to the text, so there is no transform over rows, columns and frames. A value with fewer than two
    axes has no tokens and is repeated. The value that is forecast, what all blocks between Fn and Bn add, is the
    "cumulative residual feature" of the paper.

    Source: arXiv:2510.08669, in the form of its implementation for FLUX: a Fourier transform along the flattened
    tokens, order 0 for the frequencies up to `low_frequencies` of the highest one, and Hermite polynomials of order 2
    with a `sigma` of 0.71 for the others.

    Attributes:
        order: The order for high frequencies; one more value than this is stored.
        sigma: The contraction factor of the Hermite polynomials (see `HiCacheCalibratorConfig`).
        low_frequencies: The highest frequency that is repeated, as a fraction of the highest frequency, from 0 (only
            the mean over the tokens) to 1 (all).

    Raises:
        ConfigError: The value of a field is not allowed.
    """

    order: int = 2
    sigma: float = 0.71
    low_frequencies: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("order", self.order, least=0)
        check_number("sigma", self.sigma)
        check_number("low_frequencies", self.low_frequencies)

    @property
    def depth(self) -> int:
        return self.order + 1

    def forecasts_from(self, count: int) -> bool:
        return count > 1

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the factor of each computed value in the forecast of the high frequencies, newest first."""
        return hermite_factors(times, self.sigma)

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        newest = widened(history[0])
        if newest.dim() < 2:
            return history[0]
        change = (numbers[0] - 1) * newest
        for i in range(1, len(history)):
            change = change + numbers[i] * widened(history[i])
        # The transform is linear: what the low frequencies would change by is taken away from the change.
        forecast: torch.Tensor = newest + change - low_frequencies(change, self.low_frequencies)
        return forecast.to(history[0].dtype)


def low_frequencies(value: torch.Tensor, fraction: float) -> torch.Tensor:
    """Returns the part of the value whose frequencies along axis -2 are at most `fraction` of the highest one."""
    length = value.shape[-2]
    count = min(int(fraction * (length // 2)), length // 2) + 1
    spectrum = torch.fft.rfft(value, dim=-2)[..., :count, :]
    part: torch.Tensor = torch.fft.irfft(spectrum, n=length, dim=-2)
    return part
