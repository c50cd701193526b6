"""Measures the memory that a generation allocates, and how long the device waits for the host."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float, str]  # begin, end, name; in one unit of time.


def allocated_peak(run: Callable[[], None], device: str) -> int:
    """Returns the peak of the bytes that `run` allocates, beyond those that were allocated before it.

    On a CPU, all allocations of PyTorch's allocator are counted (the profiler's memory records), but not those that
    oneDNN and the compiled code make themselves. On an accelerator, this is the count of the caching allocator.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    records = [event for event in _raw_events(found) if event.name() == "[memory]"]
    return running_peak([event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())])


def running_peak(changes: Sequence[int]) -> int:
    """Returns the largest partial sum of `changes`, at least 0."""
    level = peak = 0
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak


def peak_rss_bytes() -> int:
    """Returns the peak of the resident memory of this process, in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else 1024 * usage


def host_reads(run: Callable[[], None], device: str) -> dict[str, Any]:
    """Returns how long the device was idle after each copy to the host, in microseconds; empty on a CPU."""
    if device == "cpu":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    events = [event for event in _raw_events(found) if event.device_type() == DeviceType.CUDA]
    marks = [
        (event.start_ns() / 1e3, event.start_ns() / 1e3 + event.duration_ns() / 1e3, event.name()) for event in events
    ]
    return gaps([mark for mark in marks if not is_annotation(mark[2])])


def gaps(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Returns statistics of the pauses in the activity of a device: after copies to the host, others, and all."""
    ordered = sorted(intervals)
    if not ordered:
        return {}
    after_reads, others = [], []
    begin, reached, last = ordered[0]
    first = begin
    for begin, end, name in ordered[1:]:
        pause = max(0.0, begin - reached)  # Work of several streams may overlap.
        (after_reads if "DtoH" in last else others).append(pause)
        reached, last = max(reached, end), name
    span = reached - first
    return {
        "reads": len(after_reads),
        "bubble_us": statistics.median(after_reads) if after_reads else 0.0,
        "bubbles_share": sum(after_reads) / span if span else 0.0,
        "other_pause_us": statistics.median(others) if others else 0.0,
        "idle_share": (sum(after_reads) + sum(others)) / span if span else 0.0,
    }


def is_annotation(name: str) -> bool:
    """Whether an event of a device is no activity but a name for a time span."""
    return name.startswith(
        ("gpu_user_annotation", "ProfilerStep", "## Call", "Torch-Compiled Region", "Activity Buffer")
    )


def _raw_events(found: profile) -> Any:
    assert found.profiler is not None and found.profiler.kineto_results is not None
    return found.profiler.kineto_results.events()
