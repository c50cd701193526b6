"""Measures how long a step takes, with the clock of the host, or with events in the stream of the accelerator.

Taking a time does not synchronize with the device. Reading it does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch


class Stopwatch:
    """Measures the time from its creation to `stop`."""

    __slots__ = ("_device", "_start")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = _mark(device)

    def stop(self) -> StepTime:
        return StepTime(self._start, _mark(self._device))


class StepTime:
    """A start and a stop, which are host times or events. `seconds` waits until the device has reached the stop."""

    __slots__ = ("_start", "_stop")

    def __init__(self, start: Any, stop: Any) -> None:
        self._start, self._stop = start, stop

    @property
    def seconds(self) -> float:
        if isinstance(self._stop, float):
            return self._stop - float(self._start)
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1000


class StepTimes(Sequence[float]):
    """A sequence of seconds that is read at access, since statistics are made before the device is finished."""

    __slots__ = ("_step_times",)

    def __init__(self, step_times: Sequence[StepTime]) -> None:
        self._step_times = tuple(step_times)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return [step_time.seconds for step_time in self._step_times[index]]
        return self._step_times[index].seconds

    def __len__(self) -> int:
        return len(self._step_times)

    def __iter__(self) -> Iterator[float]:
        return (step_time.seconds for step_time in self._step_times)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@functools.cache
def _has_events(device_type: str) -> bool:
    """Whether events of this device measure time."""
    try:
        torch.Event(device_type, enable_timing=True).record()
    except Exception:  # Which one depends on the device.
        return False
    return device_type != "cpu"


def _mark(device: torch.device) -> Any:
    if not _has_events(device.type):
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event
