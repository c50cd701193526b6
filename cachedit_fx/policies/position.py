"""The place of a step in its generation, and the steps that are computed because of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from cachedit_fx.config.cache_config import CacheConfig

EARLY_SHARE = 1 / 6  # Of the range of the timesteps; it decides what an image or a clip shows (docs/quality.md).


class Progress(NamedTuple):
    """The place of a step in its generation.

    Attributes:
        number: The number of the step, from 0.
        length: The number of steps of the generation; None if it is not known.
        num_early: The number of steps of the session until the timestep has changed by a sixth (`num_early_steps`);
            None if the timesteps are not known.
    """

    number: int
    length: int | None
    num_early: int | None = None


def must_compute(config: CacheConfig, progress: Progress) -> str | None:
    """The reason why a step is computed because of its place in the generation; None if it may be reused.

    Without a known length, no step of a generation with such a limit is reused.
    """
    start, end, final = config.start_percent, config.end_percent, config.final_compute_steps
    if not start and end >= 1 and not final:
        return None
    number, length, _ = progress
    if length is None:
        return "length-unknown"
    if number < start * length:
        return "before-start"
    if number >= end * length:
        return "after-end"
    return "final" if number >= length - final else None


def num_early_steps(timesteps: Sequence[float], start: int = 0) -> int | None:
    """Returns how many steps from `start` on are made before the timestep has changed by a sixth of its range.

    The range is from 0 to the first or the last timestep, whichever is larger. Schedulers with a shift for large images
    and videos make many such steps, and those of models that are distilled to a few steps make one or two.

    Args:
        timesteps: The timesteps of a run of a scheduler, in any unit.
        start: The index of the first step.

    Returns:
        At least 1; None if the timesteps say nothing: `start` is not one of them, or they are not finite or all 0.
    """
    left = tuple(timesteps[start:]) if start >= 0 else ()
    extent = max(map(abs, left[:1] + left[-1:]), default=0.0)
    if not extent or not all(map(math.isfinite, left)):
        return None
    return sum(1 for _ in itertools.takewhile(lambda t: abs(t - left[0]) < EARLY_SHARE * extent, left))
