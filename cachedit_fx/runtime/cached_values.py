"""What is kept of a value that leaves a region, and what a reused step makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, overload

import torch

from cachedit_fx.forecasters.forecaster import Forecaster, Times
from cachedit_fx.forecasters.verdict import unproven
from cachedit_fx.patterns.blocks import HIDDEN

# Positions of the steps reused since the last computed one, and of those between it and the one before (`Times`).
Reused = tuple[tuple[float, ...], tuple[float, ...]]


class Functions(Protocol):
    """A forecaster's functions, compiled."""

    def predict(
        self, history: tuple[torch.Tensor, ...], numbers: Sequence[float], verdict: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Forecaster.predict` and `verdict.choose`."""

    def judge(
        self,
        history: tuple[torch.Tensor, ...],
        value: torch.Tensor,
        verdict: torch.Tensor,
        times: Times,
        *,
        is_static: bool,
    ) -> torch.Tensor:
        """See `CompiledForecaster.judge`."""

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
        """See `covered`."""
        return covered(self.forecaster, roles)


def covered(forecaster: Forecaster, roles: Sequence[str]) -> tuple[bool, ...]:
    """Of what leaves a region, which values are forecast. The first stands for the hidden stream if none is it."""
    main = HIDDEN if HIDDEN in roles else next(iter(roles), HIDDEN)
    hidden, others = forecaster.enable_calibrator, forecaster.enable_encoder_calibrator
    return tuple(hidden if role == main else others for role in roles)


class CachedValue(NamedTuple):
    """One value that leaves a region, as it was at the last computed steps.

    Attributes:
        tensors: What the region added to the stream, or the value itself, newest first (or what a forecaster makes of
            these); without a forecaster one. Empty before the first computed step, and for a stream whose sizes depend
            on data and that did not keep its shape.
        positions: Of the computed steps, newest first (`Times.computed`); empty without a forecaster.
        verdict: For each sample whether forecasts are used, bool [B] on the device, where the host need not read it:
            false while the forecast of the newest computed step was no better than the value before it. None without
            a forecaster, or where it makes its own history.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    positions: tuple[float, ...] = ()
    verdict: torch.Tensor | None = None

    @property
    def last(self) -> torch.Tensor | None:
        """What stands for all of them where shapes are compared."""
        return self.tensors[0] if self.tensors else None

    @property
    def num_bytes(self) -> int:
        held = self.tensors if self.verdict is None else (*self.tensors, self.verdict)
        return sum(tensor.nbytes for tensor in held)

    def taking_in(
        self,
        value: torch.Tensor | None,
        now: float,
        between: Reused,
        forecast: Forecast | None,
        *,
        is_static: bool,
    ) -> CachedValue:
        """With the value of a computed step, which the forecast of it is compared with."""
        if value is None or forecast is None or not value.is_floating_point():
            return CachedValue((value,) if value is not None else ())
        ages = tuple(now - position for position in self.positions)
        verdict = self.verdict
        if not forecast.forecaster.holds_values:
            verdict = None
        elif verdict is None:
            verdict = unproven(value)
        else:
            times = Times(self.positions, now, *between)
            verdict = forecast.functions.judge(self.tensors, value, verdict, times, is_static=is_static)
        tensors = forecast.functions.update(self.tensors, value, ages)
        return CachedValue(tensors, (now, *self.positions)[: forecast.forecaster.depth], verdict)

    def at(self, now: float, between: Reused, forecast: Forecast | None, *, is_outdated: bool) -> torch.Tensor | None:
        """The value at a reused step: the last one where nothing is forecast, or the history is outdated."""
        if forecast is None or not self.positions or (is_outdated and self.verdict is not None):
            return self.last
        times = Times(self.positions, now, *between)
        return forecast.functions.predict(self.tensors, forecast.forecaster.numbers(times), self.verdict)

    def verdict_at(self, forecast: Forecast, *, is_outdated: bool) -> torch.Tensor | bool:
        """Whether `at` forecasts: for each sample as a tensor, or for all."""
        if not self.positions or not forecast.forecaster.forecasts_from(len(self.tensors)):
            return False
        return True if self.verdict is None else False if is_outdated else self.verdict


# A reused step's number, and the verdicts of its streams that are told on the device; none where one of them is False.
Unread = tuple[int, tuple[torch.Tensor, ...]]


class NotForecast(Sequence[int]):
    """Numbers of the reused steps that did not use the forecaster. Reads the verdicts when it is first asked."""

    __slots__ = ("_steps", "_unread")

    def __init__(self, unread: Sequence[Unread]) -> None:
        self._unread: Sequence[Unread] = tuple(unread)
        self._steps: list[int] | None = None

    @property
    def steps(self) -> list[int]:
        if self._steps is None:
            distinct = {id(verdict): verdict for _, verdicts in self._unread for verdict in verdicts}
            if any(verdict.is_cuda for verdict in distinct.values()):
                torch.cuda.synchronize()  # The steps may have run in another thread's stream.
            used = {key: bool(verdict.all()) for key, verdict in distinct.items()}
            self._steps = [
                step for step, verdicts in self._unread if not all(used[id(v)] for v in verdicts) or not verdicts
            ]
            self._unread = ()
        return self._steps

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.steps == list(other)

    __hash__ = None  # type: ignore[assignment]
