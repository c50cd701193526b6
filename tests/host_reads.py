"""Counts the numbers and tensors that the host reads during the calls of a module, on any device.

On a GPU, each of these reads waits for the device. Methods of `Tensor` are replaced, so that compiled pieces and fast
dispatch run as they always do; a dispatch mode would change how they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cachedit_fx.frontend.enabled import Enabled
from cachedit_fx.runtime import host_read
from cachedit_fx.runtime.shadow import ShadowedStep
from cachedit_fx.runtime.step import StepRun

READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


@contextmanager
def counted_reads() -> Iterator[list[list[str]]]:
    """The reads of every call of a cached module inside the context.

    Each is "early" (before a region has been decided about), "decision" (while it is), "late" (after the last
    decision of the call, when the device has been given the blocks), or "shadow" (when a step is run again).
    """
    calls: list[list[str]] = []
    phase = [""]  # Empty outside of calls: what a scheduler or a test reads does not count.
    depth = [0]

    def counting(original: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if phase[0] and not depth[0]:
                calls[-1].append(phase[0])
            depth[0] += 1  # A read that another one calls is part of it.
            try:
                return original(tensor, *args, **kwargs)
            finally:
                depth[0] -= 1

        return read

    def within(original: Any, first: str, after: str | None) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, phase[0] = phase[0], first
            if not before:
                calls.append([])
            try:
                return original(*args, **kwargs)
            finally:
                phase[0] = after if after is not None and before else before if before else ""

        return run

    with pytest.MonkeyPatch.context() as patched:
        for name in READS:
            patched.setattr(Tensor, name, counting(getattr(Tensor, name)))
        patched.setattr(Enabled, "__call__", within(Enabled.__call__, "early", None))
        patched.setattr(StepRun, "decide", within(StepRun.decide, "decision", "late"))
        patched.setattr(ShadowedStep, "compare", within(ShadowedStep.compare, "shadow", "late"))
        yield calls


class FakeEvent:
    """An event of a device that has reached it when the host waits for it. Writes down what happens, in order."""

    def __init__(self, log: Callable[[str], None], source: Tensor, copy: Tensor) -> None:
        self._log, self._source, self._copy = log, source, copy

    def synchronize(self) -> None:
        self._log("wait")
        self._copy.copy_(self._source)


@contextmanager
def copied_reads(clock: Callable[[], int] = lambda: 0) -> Iterator[list[Any]]:
    """Makes reads take the way of a CUDA device: a copy holds its numbers only after the host has waited for its event.

    Yields what happens, in order: "start" or "wait", and what the clock shows.
    """
    log: list[Any] = []

    def write(what: str) -> None:
        log.append((what, clock()))

    def start(tensor: Tensor) -> tuple[Tensor, Any]:
        write("start")
        copy = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else -1)
        return copy, FakeEvent(write, tensor, copy)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host_read, "is_copied", lambda _tensor: True)
        patched.setattr(host_read, "copy_to_host", start)
        yield log
