"""The base class of forecasters: a pair of torch functions that store computed values and forecast the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.forecasters.forecaster_fields import check_choice, check_names, check_switch


@dataclass(frozen=True, slots=True)
class Times:
    """The positions of a step and of the steps before it.

    A position is the number of the step, or the distance between its timestep and the first timestep of the
    generation. It grows from step to step.

    Attributes:
        computed: Positions of the computed steps whose values are in the history, newest first; never empty in
            `predict`.
        now: Position of this step.
        reused: Positions of the steps that were reused since the newest computed one, oldest first, without this step.
        between: Positions of the steps that were reused between the two newest computed ones, oldest first.
    """

    computed: tuple[float, ...]
    now: float
    reused: tuple[float, ...] = ()
    between: tuple[float, ...] = ()

    @property
    def ages(self) -> tuple[float, ...]:
        """The distance from each computed step to this step, newest first."""
        return tuple(self.now - position for position in self.computed)


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Forecasts what the blocks add to a stream at a reused step. The base class repeats the last value.

    If the last value was clearly better than the forecast at the newest computed step, it is used instead of a
    forecast (docs/forecasters.md).

    A subclass is a frozen dataclass, so that two objects with equal fields are equal, and overrides the methods that it
    needs. `update` and `predict` are compiled by the inner backend, once per number of tensors in the history. They may
    use torch operations and the length of the history. They must not use a value of `numbers` in Python.

    Attributes:
        by: What the positions are: "step" (the number of the step) or "timestep" (the distance from the first
            timestep).
        enable_calibrator: Whether the hidden stream is forecast.
        enable_encoder_calibrator: Whether all other streams are forecast. A stream that is not forecast repeats its
            last value.
        calibrator_cache_type: What is forecast. The only value is "residual", what the blocks add. cache-dit's
            "hidden_states", what the blocks return, is refused, because a reused step adds to the current streams.

    Raises:
        ConfigError: A field is unknown, or its value is not allowed. It is a ValueError.
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
                "cachedit_fx: calibrator_cache_type must be 'residual' (a reused step adds the forecast to the current "
                f"streams), got {shown(self.calibrator_cache_type)}"
            )

    @property
    def depth(self) -> int:
        """The largest number of computed steps in the history, and of positions in `Times.computed`."""
        return 1

    @property
    def holds_values(self) -> bool:
        """Whether the history consists of the computed values themselves, newest first.

        If it does, forecasts are compared with the newest value, and are not used while they are clearly worse. A class
        that overrides `update` has a history of its own kind.
        """
        return type(self).update is Forecaster.update

    def forecasts_from(self, count: int) -> bool:
        """Returns whether `predict` forecasts from `count` values. If not, the last value is repeated without it."""
        return type(self).predict is not Forecaster.predict

    def numbers(self, times: Times) -> Sequence[float]:
        """Returns the numbers that `predict` receives as a float32 tensor. This method runs on the host.

        Their count may depend on the length of `times.computed` only.
        """
        return times.ages

    def _summary(self, history: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Returns what `_numbers_of` needs to know of the history, computed once after each computed step.

        One-dimensional. The host reads it when the device has long computed it.
        """
        return None

    def _numbers_of(self, times: Times, summary: Sequence[float], dtype: torch.dtype) -> Sequence[float]:
        """Returns the numbers that `predict` receives, if there is a summary of a history of this dtype."""
        return self.numbers(times)

    def update(
        self, history: tuple[torch.Tensor, ...], value: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Returns the history with the value of a computed step added, newest first, at most `depth` tensors.

        Args:
            history: Tensors of one stream with the shape and dtype of `value`; empty at the first computed step.
            value: The value of the computed step.
            numbers: `times.ages` of the computed steps in the history, float32.
        """
        return (value, *history)[: self.depth]

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        """Returns the forecast of the value at a step, with the shape and dtype of the tensors in the history.

        Args:
            history: What `update` returned at the last computed step; not empty.
            numbers: What `numbers` returned, float32.
        """
        return history[0]


class LinearForecaster(Forecaster):
    """A forecaster whose forecast is a weighted sum of the last values. `numbers` returns the factors."""

    def predict(self, history: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> torch.Tensor:
        """Returns the sum of numbers[i] * history[i], summed in float32 (in float64 if the values are float64)."""
        total = numbers[0] * widened(history[0])
        for i in range(1, len(history)):
            total = total + numbers[i] * widened(history[i])
        return total.to(history[0].dtype)


def widened(value: torch.Tensor) -> torch.Tensor:
    """Returns the value in float32, or unchanged if it is float64."""
    return value if value.dtype == torch.float64 else value.float()


def distinct(positions: Sequence[float]) -> list[int]:
    """Returns the indices of the computed steps with distinct positions, newest first.

    A scheduler may call the model twice at one timestep, and two values at one position have no slope between them. Of
    these, the newer one is used.
    """
    indices: list[int] = []
    for i, position in enumerate(positions):
        if not indices or position < positions[indices[-1]]:
            indices.append(i)
    return indices
