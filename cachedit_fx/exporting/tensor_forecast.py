"""Forecasts and their verdicts as tensor operations: what `CachedValue` does, if the number of values is a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachedit_fx.exporting.tensor_factors import numbers_in_tensors
from cachedit_fx.forecasters.compile import FUNCTIONS
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.verdict import JUMP, LOST, NEVER, RECENT


class TensorTimes(NamedTuple):
    """The times of a step, and the numbers that follow from them.

    Attributes:
        num_values: The number of computed steps in the history, int64 [].
        is_outdated: Whether there is a gap or a jump between the history and this step, bool [].
        numbers: For each of `counts_of`, `Forecaster.numbers` and then `verdict.terms`, float32.
    """

    num_values: Tensor
    is_outdated: Tensor
    numbers: tuple[Tensor, ...]


def counts_of(forecaster: Forecaster) -> list[int]:
    """The numbers of values from which the forecaster forecasts."""
    return [count for count in range(1, forecaster.depth + 1) if forecaster.forecasts_from(count)]


def times_of(
    forecaster: Forecaster, num_values: Tensor, positions: Tensor, now: Tensor, is_outdated: Tensor, *, is_static: bool
) -> TensorTimes:
    """The times of a step.

    Args:
        positions: Positions of the computed steps, newest first, float64 [depth].
        now: Position of the step, float64 [].
    """
    found = []
    for count in counts_of(forecaster):
        computed = positions[:count]
        numbers = numbers_in_tensors(forecaster, computed, now)
        found.append(torch.cat((numbers, _terms(computed, now, is_static=is_static))))
    return TensorTimes(num_values, is_outdated, tuple(found))


def _terms(computed: Tensor, now: Tensor, *, is_static: bool) -> Tensor:
    """`verdict.terms`, float32 [2]."""
    one = torch.ones_like(now)
    ratio = ((now - computed[0]) / (computed[0] - computed[1])).clamp(min=1) if len(computed) > 1 else one
    return torch.stack((ratio, one * (NEVER if is_static else LOST))).float()


def forecast(forecaster: Forecaster, history: Sequence[Tensor], verdict: Tensor, times: TensorTimes) -> Tensor:
    """The value at a reused step, like `CachedValue.at`.

    Args:
        history: `depth` tensors, newest first, of which `times.num_values` are used.
        verdict: Whether forecasts are used, for each sample, bool [B].
    """
    choose, found = FUNCTIONS["choose"](forecaster), history[0]
    for count, numbers in zip(counts_of(forecaster), times.numbers, strict=True):
        (chosen,) = choose(*history[:count], verdict, numbers[:-2])
        found = torch.where(times.num_values == count, chosen, found)
    return torch.where(times.is_outdated, history[0], found)


def verdict_after(
    forecaster: Forecaster, history: Sequence[Tensor], value: Tensor, verdict: Tensor, times: TensorTimes
) -> Tensor:
    """The verdict after a computed step, bool [B], like `CachedValue.with_value`."""
    judge, found = FUNCTIONS["judge"](forecaster), verdict
    for count, numbers in zip(counts_of(forecaster), times.numbers, strict=True):
        (judged,) = judge(*history[:count], value, verdict, numbers)
        found = torch.where(times.num_values == count, judged, found)
    return found | times.is_outdated | (times.num_values == 0)  # Forecasts are used until they are proven wrong.


def is_jump(change: Tensor, before: Tensor, num_known: Tensor) -> Tensor:
    """`verdict.is_jump`.

    Args:
        change: float64 [].
        before: The last changes before it, oldest first, float64 [RECENT].
        num_known: How many of the last of them exist.
    """
    ages = torch.arange(RECENT, 0, -1, device=before.device)
    is_finite = before.isfinite() & (ages <= num_known)
    largest = torch.where(is_finite, before, 0.0).amax()
    return (is_finite.sum() > 1) & (change > JUMP * largest) & (largest > 0)


def is_gap(timesteps: Tensor, num_known: Tensor) -> Tensor:
    """`verdict.is_gap`.

    Args:
        timesteps: The timesteps of the last steps and of this one, oldest first, float64 [RECENT + 2].
        num_known: How many steps there are before this one.
    """
    moves = (timesteps[1:] - timesteps[:-1]).abs()
    return is_jump(moves[-1], moves[:-1], num_known - 1)
