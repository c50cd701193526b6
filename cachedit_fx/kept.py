"""What is kept of a value that leaves a region, and what a reused step makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cachedit_fx.forecasters.forecaster import Forecaster, Times
from cachedit_fx.patterns.chain import HIDDEN

# Positions of the steps reused since the last computed one, and of those between it and the one before (`Times`).
Reused = tuple[tuple[float, ...], tuple[float, ...]]


class Functions(Protocol):
    """A forecaster's two functions, compiled."""

    def predict(self, history: tuple[torch.Tensor, ...], numbers: Sequence[float]) -> torch.Tensor:
        """See `Forecaster.predict`."""

    def update(
        self, history: tuple[torch.Tensor, ...], value: torch.Tensor, numbers: Sequence[float]
    ) -> tuple[torch.Tensor, ...]:
        """See `Forecaster.update`."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecaster, and its functions as the inner backend compiled them."""

    forecaster: Forecaster
    functions: Functions

    def covers(self, roles: Sequence[str]) -> tuple[bool, ...]:
        """Of what leaves a region, which values are forecast. The first stands for the hidden stream if none is it."""
        main = HIDDEN if HIDDEN in roles else next(iter(roles), HIDDEN)
        own, others = self.forecaster.enable_calibrator, self.forecaster.enable_encoder_calibrator
        return tuple(own if role == main else others for role in roles)


@dataclass(frozen=True, slots=True)
class Kept:
    """One value that leaves a region, as it was at the last computed steps.

    Attributes:
        tensors: What the region added to the stream, or the value itself, newest first (or what a forecaster makes of
            these); without a forecaster one. Empty before the first computed step, and for a stream whose sizes depend
            on data and that did not keep its shape.
        positions: Of the computed steps, newest first (`Times.computed`); empty without a forecaster.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    positions: tuple[float, ...] = ()

    @property
    def last(self) -> torch.Tensor | None:
        """What stands for all of them where shapes are compared."""
        return self.tensors[0] if self.tensors else None

    def taking_in(self, value: torch.Tensor | None, now: float, forecast: Forecast | None) -> Kept:
        """With the value of a computed step."""
        if value is None or forecast is None or not value.is_floating_point():
            return Kept((value,) if value is not None else ())
        ages = tuple(now - position for position in self.positions)
        tensors = forecast.functions.update(self.tensors, value, ages)
        return Kept(tensors, (now, *self.positions)[: forecast.forecaster.depth])

    def at(self, now: float, between: Reused, forecast: Forecast | None) -> torch.Tensor | None:
        """The value at a reused step."""
        if forecast is None or not self.positions:
            return self.last
        times = Times(self.positions, now, *between)
        return forecast.functions.predict(self.tensors, forecast.forecaster.numbers(times))
