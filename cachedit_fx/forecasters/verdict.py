"""Whether a forecast is used: at every computed step it is compared with the last value, and must not have lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from cachedit_fx.forecasters.forecaster import Times, widened

# A forecast has lost if its squared error is so many times the last value's. Not as soon as it is larger: what the last
# value misses adds up from step to step, and what a forecast misses points hither and thither.
_LOST = 1.5
_NEVER = 1e30  # Where the steps were chosen beforehand, and the forecaster with them: there a jump alone counts.
# A change is a jump if it is so many times the largest of the `_RECENT` before it.
_JUMP, _RECENT = 3.0, 3
_EXPLAINED = 0.8  # Of a jump's square, at the most, what a forecast that did not foresee it leaves over by chance.


def num_verdicts(value: torch.Tensor) -> int:
    """One per sample, a byte each; what has less than three axes is a single sample."""
    return int(value.shape[0]) if value.dim() > 2 else 1


def unproven(value: torch.Tensor) -> torch.Tensor:
    """The verdict before there is any: the forecast is used. Bool [B]."""
    return torch.ones(num_verdicts(value), dtype=torch.bool, device=value.device)


def judge(
    history: tuple[torch.Tensor, ...],
    forecast: torch.Tensor,
    value: torch.Tensor,
    verdict: torch.Tensor,
    terms: torch.Tensor,
) -> torch.Tensor:
    """For each sample, whether forecasts are used after a computed step.

    Not if the forecast of this very step was clearly further from its value than the last value is, or if the value
    jumped and the forecast did not foresee it: the jump would be taken for a slope.

    Args:
        history: Values of the computed steps before, newest first.
        forecast: What was foretold of this step.
        value: The computed value; of less than three axes it is a single sample.
        verdict: The one before, bool [B], which stays where the forecast was the last value.
        terms: What `terms` returned, float32 [2].

    Returns:
        Bool [B].
    """
    missed, moved = _squares(forecast, value), _squares(history[0], value)
    has_lost = ~(missed <= terms[1] * moved)  # Or is no number.
    if len(history) > 1:
        before = _squares(history[1], history[0])
        has_jumped = moved > (_JUMP * terms[0]) ** 2 * before
        has_lost |= has_jumped & (missed > _EXPLAINED * moved)
    # A forecast that was the last value itself tells nothing, as at a timestep that is asked for twice.
    return torch.where(missed == moved, verdict, ~has_lost)


def terms(times: Times, *, is_static: bool) -> tuple[float, float]:
    """The time since the newest value in units of the time between the newest two, 1 at least; and how many times the
    last value's squared error a forecast's may be.

    Args:
        is_static: The steps that compute were chosen beforehand. Forecasts are worst at the end of a gap, which is
            where they are judged, and yet may pay on the whole; the choice of the schedule has taken that in.
    """
    ages = times.ages
    gap = ages[1] - ages[0] if len(ages) > 1 else 0.0
    return max(1.0, ages[0] / gap) if gap > 0 else 1.0, _NEVER if is_static else _LOST


def _squares(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared distance of each sample, in float32 (float64 stays)."""
    axes = tuple(range(1 if one.dim() > 2 else 0, one.dim()))
    return (widened(one) - widened(other)).square().sum(axes).view(-1)


def choose(last: torch.Tensor, forecast: torch.Tensor, verdict: torch.Tensor) -> torch.Tensor:
    """The forecast for the samples where the verdict (bool [B]) is True, the last value for the others."""
    return torch.where(verdict.view(-1, *[1] * (last.dim() - 1)), forecast, last).view(last.shape)


def is_jump(change: float, before: Sequence[float]) -> bool:
    """Whether a change is out of all proportion to the last few before it, of which two at least must be known."""
    known = [c for c in before[-_RECENT:] if math.isfinite(c)]
    return len(known) > 1 and change > _JUMP * max(known) > 0


def is_gap(timesteps: Sequence[float | None]) -> bool:
    """Whether steps were left out before the newest of these timesteps, as those without guidance."""
    known = [t for t in timesteps[-_RECENT - 2 :] if t is not None]
    moves = [abs(b - a) for a, b in itertools.pairwise(known)]
    return bool(moves) and is_jump(moves[-1], moves[:-1])
