"""Decides whether forecasts are used, by comparing them at every computed step with the last value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from cachedit_fx.forecasters.forecaster import Times, widened

# A forecast has lost if its squared error is this many times that of the last value. The factor is greater than 1
# because the errors of the last value add up from step to step, while those of forecasts point in varying directions.
LOST = 1.5
NEVER = 1e30  # For steps that were chosen beforehand together with the forecaster: only a jump counts there.
# A change is a jump if it is this many times the largest of the last `RECENT` changes.
JUMP, RECENT = 3.0, 3
_EXPLAINED = 0.8  # A forecast that leaves more than this part of a jump's square did not predict the jump.


def num_verdicts(value: torch.Tensor) -> int:
    """Returns the number of samples; a value with fewer than three dimensions is a single sample."""
    return int(value.shape[0]) if value.dim() > 2 else 1


def unproven(value: torch.Tensor) -> torch.Tensor:
    """Returns the initial verdict, bool [B]: forecasts are used."""
    return torch.ones(num_verdicts(value), dtype=torch.bool, device=value.device)


def judge(
    history: tuple[torch.Tensor, ...],
    forecast: torch.Tensor,
    value: torch.Tensor,
    verdict: torch.Tensor,
    terms: torch.Tensor,
) -> torch.Tensor:
    """Decides for each sample whether forecasts are used after a computed step.

    They are not used if the forecast of this step was clearly further from the computed value than the last value is.
    They are not used either if the value jumped and the forecast did not predict it, because the next forecast would
    take the jump for a slope.

    Args:
        history: Values of the previous computed steps, newest first.
        forecast: The forecast of this step, with the shape of `value`.
        value: The computed value; with fewer than three dimensions, it is a single sample.
        verdict: The previous verdict, bool [B]; it stays if the forecast was the last value.
        terms: What the function `terms` returned, float32 [2].

    Returns:
        The new verdict, bool [B].
    """
    missed, moved = _squares(forecast, value), _squares(history[0], value)
    has_lost = ~(missed <= terms[1] * moved)  # Also True if `missed` is NaN.
    if len(history) > 1:
        before = _squares(history[1], history[0])
        has_jumped = moved > (JUMP * terms[0]) ** 2 * before
        has_lost |= has_jumped & (missed > _EXPLAINED * moved)
    # A forecast that equals the last value gives no evidence, as at a timestep for which the model is called twice.
    return torch.where(missed == moved, verdict, ~has_lost)


def terms(times: Times, *, is_static: bool) -> tuple[float, float]:
    """Returns two dimensionless numbers that `judge` needs.

    The first is the time since the newest value in units of the time between the newest two, at least 1. The second is
    the largest squared error of a forecast, relative to that of the last value, with which it has not lost.

    Args:
        times: The times of the step that is judged.
        is_static: Whether the computed steps were chosen beforehand. Forecasts are worst at the end of a gap, where
            they are judged, and may still pay off as a whole. The choice of the schedule has considered that.
    """
    ages = times.ages
    gap = ages[1] - ages[0] if len(ages) > 1 else 0.0
    return max(1.0, ages[0] / gap) if gap > 0 else 1.0, NEVER if is_static else LOST


def _squares(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the squared distance of each sample, [B], float32 (float64 if the values are)."""
    axes = tuple(range(1 if one.dim() > 2 else 0, one.dim()))
    return (widened(one) - widened(other)).square().sum(axes).view(-1)


def choose(last: torch.Tensor, forecast: torch.Tensor, verdict: torch.Tensor) -> torch.Tensor:
    """Returns the forecast for the samples whose verdict (bool [B]) is True, and the last value for the others."""
    return torch.where(verdict.view(-1, *[1] * (last.dim() - 1)), forecast, last).view(last.shape)


def is_jump(change: float, before: Sequence[float]) -> bool:
    """Returns whether a change is much larger than the last changes before it; False with fewer than two of them."""
    finite = [c for c in before[-RECENT:] if math.isfinite(c)]
    return len(finite) > 1 and change > JUMP * max(finite) > 0


def is_gap(timesteps: Sequence[float | None]) -> bool:
    """Returns whether steps were skipped before the newest of these timesteps, such as steps without guidance."""
    known = [t for t in timesteps[-RECENT - 2 :] if t is not None]
    moves = [abs(b - a) for a, b in itertools.pairwise(known)]
    return bool(moves) and is_jump(moves[-1], moves[:-1])
