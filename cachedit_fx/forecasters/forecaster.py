"""What a forecaster is: a pair of small torch functions, one that takes a computed value in, one that foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.forecasters.fields import check_choice, check_names, check_switch


@dataclass(frozen=True, slots=True)
class Times:
    """Where a step stands among those before it. Positions grow from step to step: the step's number, or how far the
    timestep has moved since the generation's first.

    Attributes:
        computed: Positions of the computed steps whose values were taken in, newest first; never empty in `predict`.
        now: Position of this step.
        reused: Positions of the steps reused since the newest computed one, oldest first, without this one.
        between: Positions of the steps reused between the two newest computed ones, oldest first.
    """

    computed: tuple[float, ...]
    now: float
    reused: tuple[float, ...] = ()
    between: tuple[float, ...] = ()

    @property
    def ages(self) -> tuple[float, ...]:
        """How long ago each computed step was, newest first."""
        return tuple(self.now - position for position in self.computed)


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Foretells what a stream's blocks add at a reused step. The base class repeats the last value.

    Where that was clearly better at the newest computed step, it is done in place of a forecast (docs/forecasters.md).

    A subclass is a frozen dataclass, so that equal ones are equal, and overrides what it needs. `update` and `predict`
    are compiled by the inner backend, once per number of tensors in the history; they may use torch operations alone,
    and the history's length, but no value of `numbers` in Python.

    Attributes:
        by: What positions are told by: "step" (its number) or "timestep" (the distance that the timestep has moved).
        enable_calibrator: Whether the hidden stream is forecast.
        enable_encoder_calibrator: Whether all other streams are; one that is not repeats its last value.
        calibrator_cache_type: What is forecast: "residual", what the blocks add. (cache-dit's "hidden_states", what
            they return, is refused: a reused step adds to the streams as they are now.)

    Raises:
        ConfigError: (a ValueError) a field is unknown or has a value it cannot have.
    """

    by: str = "step"
    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_cache_type: str = "residual"

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        check_names(cls.__name__, fields, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("step", "timestep"))
        check_switch("enable_calibrator", self.enable_calibrator)
        check_switch("enable_encoder_calibrator", self.enable_encoder_calibrator)
        if self.calibrator_cache_type != "residual":
            raise ConfigError(
                "cachedit_fx: calibrator_cache_type must be 'residual' (a reused step adds what is forecast to the "
                f"streams as they are), got {shown(self.calibrator_cache_type)}"
            )

    @property
    def depth(self) -> int:
        """How many computed steps are remembered: the length of `Times.computed` at the most."""
        return 1

    @property
    def holds_values(self) -> bool:
        """Whether the history holds the computed values as they are, newest first. Forecasts are then compared with the
        newest one, and not used while they do no better; a class that overrides `update` makes its own history."""
        return type(self).update is Forecaster.update

    def forecasts_from(self, count: int) -> bool:
        """Whether `predict` does anything with so many values; where not, the last one is repeated without it."""
        return type(self).predict is not Forecaster.predict

    def numbers(self, times: Times) -> Sequence[float]:
        """What `predict` is given of the times, as float32; its length may depend on how many are computed alone.

        Runs on the host.
        """
        return times.ages

    def update(
        self, history: tuple[torch.Tensor, ...], value: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The history that takes in the value of a computed step, newest first; at most `depth` tensors.

        Args:
            history: Tensors of one stream, of `value`'s shape and dtype; empty at the first computed step.
            numbers: `times.ages` of the computed steps in the history, float32.
        """
        return (value, *history)[: self.depth]

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        """The value at a reused step, or what it would be at a computed one, in the history's shape and dtype.

        Args:
            numbers: What `numbers` returned, float32.
        """
        return history[0]


class LinearForecaster(Forecaster):
    """A forecast that is a sum of the last values with factors that the times alone tell: `numbers` returns these."""

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        """sum of numbers[i] * history[i], summed in float32 (float64 stays)."""
        total = numbers[0] * widened(history[0])
        for i in range(1, len(history)):
            total = total + numbers[i] * widened(history[i])
        return total.to(history[0].dtype)


def widened(value: torch.Tensor) -> torch.Tensor:
    """The value in float32; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def distinct(positions: Sequence[float]) -> list[int]:
    """Which of the computed steps stand apart, newest first: a scheduler may ask twice at one timestep, and between
    two values at one position there is no slope; the newer one counts."""
    indices: list[int] = []
    for i, position in enumerate(positions):
        if not indices or position < positions[indices[-1]]:
            indices.append(i)
    return indices
