"""The place of a step in its generation, and the steps that are computed because of it."""

from __future__ import annotations

from typing import NamedTuple

from cachedit_fx.config.cache_config import CacheConfig


class Progress(NamedTuple):
    """The place of a step in its generation.

    Attributes:
        number: The number of the step, from 0.
        length: The number of steps of the generation; None if it is not known.
    """

    number: int
    length: int | None


def must_compute(config: CacheConfig, progress: Progress) -> str | None:
    """The reason why a step is computed because of its place in the generation; None if it may be reused.

    Without a known length, no step of a generation with such a limit is reused.
    """
    start, end, final = config.start_percent, config.end_percent, config.final_compute_steps
    if not start and end >= 1 and not final:
        return None
    number, length = progress
    if length is None:
        return "length-unknown"
    if number < start * length:
        return "before-start"
    if number >= end * length:
        return "after-end"
    return "final" if number >= length - final else None
