"""Checks of the machine: whether everything else can run at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from benchmarks.gpu.records import FAILED, PASSED, SKIPPED, Check, Emit

LEAST_TORCH = (2, 11)
CASE = "environment"


class EnvironmentWorker:
    """Runs the checks of the machine."""

    def __init__(self, device: str, inner: str) -> None:
        self._device, self._inner = device, inner

    def check(self, emit: Emit) -> dict[str, Any]:
        checks = {"versions": self._versions, "device": self._find_device, "compiler": self._compile}
        for name, check in checks.items():
            emit(_made(name, check).as_dict())
        num_devices = 0 if self._device == "cpu" else torch.cuda.device_count()
        why = "one device" if num_devices < 2 else f"{num_devices} devices, but this script has no check for several"
        expected = "a model that is split over devices"
        emit(Check(CASE, "several devices", expected, verdict=SKIPPED, reason=why).as_dict())
        return {}

    def _versions(self) -> tuple[str, str, bool]:
        number = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
        found = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        return "torch 2.11 or later", found, number >= LEAST_TORCH

    def _find_device(self) -> tuple[str, str, bool]:
        if self._device == "cpu":
            return "a CPU", "a CPU", True
        ones = torch.ones(8, device=self._device, dtype=torch.bfloat16)
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        return "a device that computes", found, ones.sum().item() == 8

    def _compile(self) -> tuple[str, str, bool]:
        compiled = torch.compile(lambda x: (x.sin() * 2).sum(-1), backend=self._inner, fullgraph=True)
        x = torch.linspace(0, 1, 4096, device=self._device).reshape(64, 64)
        error = (compiled(x) - (x.sin() * 2).sum(-1)).abs().max().item()
        return "an error below 1e-4", f"{self._inner}: {error:.1e}", error < 1e-4


def _made(name: str, check: Callable[[], tuple[str, str, bool]]) -> Check:
    try:
        expected, found, is_right = check()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Check(CASE, name, verdict=FAILED, reason=f"{type(error).__name__}: {' '.join(lines[:3])[:400]}")
    return Check(CASE, name, expected, found, PASSED if is_right else FAILED)
