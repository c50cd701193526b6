"""Finds configurations with `cachedit_fx.tune`, on other digits than those that they are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import cachedit_fx
from benchmarks.quality_setup import Setup, digits

TARGETS = (32, 35, 38, 40, 43, 45, 48)  # PSNR, dB.
_FIRST_SEED = 1000  # The bench's own begin at 0.


def calls_of(setup: Setup) -> list[Callable[[Any], Tensor]]:
    return [lambda pipe, number=number: setup.generate(number) for number in range(len(setup.calls))]


def tune_all(folder: Path, targets: Sequence[float] = TARGETS) -> list[str]:
    """Tunes for every target on twenty digits from other noise, and returns the files that `tune` saved in `folder`."""
    setup = digits(20, 10, seed=_FIRST_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for target in targets:
        result = cachedit_fx.tune(
            setup.pipe,
            calls_of(setup),
            target={"psnr": target},
            budget="runs=12",
            thresholds=(),
            peak=1.0,
            resume=folder / "measured.json",
            progress=False,
        )
        print(f"tuned for {target} dB: {result.verified}", flush=True)
        found.append(str(result.save(folder / f"psnr{target:g}.yaml")))
    return found
