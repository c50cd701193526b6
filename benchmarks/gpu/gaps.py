"""How long the device is idle at a computed and at a reused step, from the intervals of its kernels in a profile."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.memory import is_annotation

STEP = "bench:step:"  # The beginning of the annotation around the step with the number that follows.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
_COUNTS = ("busy_us", "idle_us", "kernels", "reads", "waits")
_LAUNCHES = ("cuda", "cu")  # The beginnings of the names of the runtime's calls.


@dataclass(frozen=True)
class Event:
    """One event of a profile; times in microseconds.

    Attributes:
        correlation: Equal for a kernel and the call of the runtime that launched it.
    """

    name: str
    begin: float
    end: float
    is_on_device: bool
    correlation: int = 0
    is_annotation: bool = False


def profile_steps(run_step: Callable[[int], None], num_steps: int, device: str) -> list[Event]:
    """Returns the events of a profile in which `run_step` was called with 0, 1, ..."""
    activities = [ProfilerActivity.CPU, *([] if device == "cpu" else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as found:
        for number in range(num_steps):
            with record_function(f"{STEP}{number}"):
                run_step(number)
        if device != "cpu":
            torch.cuda.synchronize()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    return [_event_of(event) for event in found.profiler.kineto_results.events()]


def _event_of(event: Any) -> Event:
    name, begin = event.name(), event.start_ns() / 1e3
    is_on_device = event.device_type() == DeviceType.CUDA
    is_annotated = is_annotation(name) or getattr(event, "is_user_annotation", lambda: False)()
    return Event(name, begin, begin + event.duration_ns() / 1e3, is_on_device, event.correlation_id(), is_annotated)


def steps_of(events: Sequence[Event]) -> list[dict[str, float]]:
    """Returns what every step did, in the order of the steps.

    A kernel belongs to the step during which the host launched it. The time of a step on the device ends with its last
    kernel, and begins where that of the previous step ended (the first step: with its first kernel).

    Returns:
        For each step `busy_us` (time in which at least one kernel or copy ran), `idle_us`, `kernels`, `reads` (copies
        to the host) and `waits` (calls of the runtime that wait for the device). Without kernels, only `waits`.
    """
    windows = sorted((e.begin, e.end, e.name) for e in events if e.name.startswith(STEP) and not e.is_on_device)
    starts = [begin for begin, _, _ in windows]

    def step_at(time: float) -> int | None:
        i = bisect.bisect_right(starts, time) - 1
        return i if i >= 0 and time <= windows[i][1] else None

    launched: dict[int, int] = {}
    found: list[dict[str, float]] = [{"waits": 0} for _ in windows]
    for event in events:
        step = None if event.is_on_device else step_at(event.begin)
        if step is None or not event.name.startswith(_LAUNCHES):
            continue
        launched[event.correlation] = step
        found[step]["waits"] += event.name in WAITS
    kernels: list[list[Event]] = [[] for _ in windows]
    for event in events:
        if event.is_on_device and not event.is_annotation and event.correlation in launched:
            kernels[launched[event.correlation]].append(event)
    reached: float | None = None
    for step, own in zip(found, kernels, strict=True):
        if not own:
            continue
        begin = min(event.begin for event in own) if reached is None else reached
        end = max(event.end for event in own)
        busy = covered([(max(event.begin, begin), event.end) for event in own])
        reads = sum("DtoH" in event.name for event in own)
        step |= {"busy_us": busy, "idle_us": max(0.0, end - begin - busy), "kernels": len(own), "reads": reads}
        reached = end
    return found


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def summary(steps: Sequence[dict[str, float]], computes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Returns the medians over the computed and over the reused steps, without the first step; and `idle_share`."""
    found = {}
    for kind, wanted in (("computed", 1), ("reused", 0)):
        own = [step for step, computed in zip(steps[1:], computes[1:], strict=False) if computed == wanted]
        keys = [key for key in _COUNTS if own and all(key in step for step in own)]
        medians = {key: statistics.median(step[key] for step in own) for key in keys}
        if medians.get("busy_us"):
            medians["idle_share"] = medians["idle_us"] / (medians["idle_us"] + medians["busy_us"])
        found[kind] = medians
    return found
