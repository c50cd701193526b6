"""Finds configurations with `cachedit_fx.tune`, on other images than those that they are measured on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import cachedit_fx
from benchmarks.quality_models import MODELS, load_setup
from benchmarks.quality_setup import Setup

TARGETS = (32, 35, 38, 40, 43, 45, 48)  # PSNR, dB.
_FIRST_SEED = 1000  # The bench's own begin at 0.


def calls_of(setup: Setup) -> list[Callable[[Any], Tensor]]:
    return [lambda pipe, number=number: setup.generate(number) for number in range(len(setup.calls))]


def tune_all(model: str, targets: Sequence[float] = TARGETS) -> dict[str, Any]:
    """Tunes for every target on twenty images from other noise, and returns what `tune` saves, by name.

    A pipeline that is not one of the trained models is tuned on its own calls.
    """
    setup = MODELS[model](20, 10, seed=_FIRST_SEED) if model in MODELS else load_setup(model, 20, 10)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            result = cachedit_fx.tune(
                setup.pipe,
                calls_of(setup),
                target={"psnr": target},
                budget="runs=12",
                thresholds=(),
                peak=1.0,
                resume=Path(folder, "measured.json"),
                progress=False,
            )
            print(f"{model}, tuned for {target} dB: {result.verified}", flush=True)
            saved = result.save(Path(folder, f"psnr{target:g}.json"))
            found[f"psnr{target:g}"] = json.loads(Path(saved).read_text("utf-8"))
    return found
