"""Cached values: what is stored of a live-out between two steps, and the value that a reused step uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, overload

import torch

from cachedit_fx.forecasters.forecaster import Forecaster, Times
from cachedit_fx.forecasters.verdict import unproven
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.runtime.host_read import HostRead

# The positions of the steps reused since the last computed step, and between that step and the computed one before it
# (see `Times`).
Reused = tuple[tuple[float, ...], tuple[float, ...]]
NONE_REUSED: Reused = ((), ())


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
        numbers: Sequence[float],
        *,
        is_static: bool,
    ) -> torch.Tensor:
        """See `CompiledForecaster.judge`."""

    def summary(self, history: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """See `CompiledForecaster.summary`."""

    def update(
        self, history: tuple[torch.Tensor, ...], value: torch.Tensor, numbers: Sequence[float]
    ) -> tuple[torch.Tensor, ...]:
        """See `Forecaster.update`."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecaster, and its functions compiled by the inner backend."""

    forecaster: Forecaster
    functions: Functions

    def covers(self, roles: Sequence[str]) -> tuple[bool, ...]:
        """See `covered`."""
        return covered(self.forecaster, roles)


def covered(forecaster: Forecaster, roles: Sequence[str]) -> tuple[bool, ...]:
    """Which live-outs are forecast. If none is the hidden stream, the first one is treated as if it were."""
    main = HIDDEN if HIDDEN in roles else next(iter(roles), HIDDEN)
    hidden, others = forecaster.enable_calibrator, forecaster.enable_encoder_calibrator
    return tuple(hidden if role == main else others for role in roles)


class CachedValue(NamedTuple):
    """What is stored of one live-out.

    Attributes:
        tensors: The residuals (or the values themselves) of the last computed steps, newest first, or what a forecaster
            makes of them. Without a forecaster, there is only one. Empty before the first computed step, and for a
            stream whose sizes depend on data and that did not keep its shape.
        positions: The positions of the computed steps, newest first (`Times.computed`). Empty without a forecaster.
        verdict: Whether forecasts are used, for each sample, bool [B] on the device. The host does not need to read it.
            False if the forecast of the last computed step was no better than the value before it. None without a
            forecaster, or if it makes its own history.
        summary: What the host has to read of the history to forecast from it; None if nothing.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    positions: tuple[float, ...] = ()
    verdict: torch.Tensor | None = None
    summary: HostRead | None = None

    @property
    def last(self) -> torch.Tensor | None:
        """The newest tensor, whose shape all of them have."""
        return self.tensors[0] if self.tensors else None

    @property
    def num_bytes(self) -> int:
        held = self.tensors if self.verdict is None else (*self.tensors, self.verdict)
        return sum(tensor.nbytes for tensor in held)

    def with_value(
        self,
        value: torch.Tensor | None,
        now: float,
        between: Reused,
        forecast: Forecast | None,
        *,
        is_static: bool,
    ) -> CachedValue:
        """The cached value after a computed step. The verdict compares `value` with its forecast."""
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
            numbers = self._numbers(forecast.forecaster, times)
            verdict = forecast.functions.judge(self.tensors, value, verdict, times, numbers, is_static=is_static)
        tensors = forecast.functions.update(self.tensors, value, ages)
        return CachedValue(tensors, (now, *self.positions)[: forecast.forecaster.depth], verdict)

    def at(self, now: float, between: Reused, forecast: Forecast | None, *, is_outdated: bool) -> torch.Tensor | None:
        """The value at a reused step: a forecast, or the last value if there is none or the history is outdated."""
        if forecast is None or not self.positions or (is_outdated and self.verdict is not None):
            return self.last
        times = Times(self.positions, now, *between)
        return forecast.functions.predict(self.tensors, self._numbers(forecast.forecaster, times), self.verdict)

    def _numbers(self, forecaster: Forecaster, times: Times) -> Sequence[float]:
        if self.summary is None:
            return forecaster.numbers(times)
        return forecaster._numbers_of(times, self.summary.numbers, self.tensors[0].dtype)

    def verdict_at(self, forecast: Forecast, *, is_outdated: bool) -> torch.Tensor | bool:
        """Whether `at` returns a forecast: for each sample as a tensor, or for all."""
        if not self.positions or not forecast.forecaster.forecasts_from(len(self.tensors)):
            return False
        return True if self.verdict is None else False if is_outdated else self.verdict


# The number of a reused step, and the verdicts of its streams that are on the device. Without verdicts, the host knows
# that a stream was not forecast.
Unread = tuple[int, tuple[torch.Tensor, ...]]


class NotForecast(Sequence[int]):
    """The numbers of the reused steps that did not use the forecaster. Reads the verdicts at the first access."""

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
