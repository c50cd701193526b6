"""Compares the errors that shadow mode predicts with the errors of a run that reuses steps.

The predicted errors are `CacheStats.errors` of a run in which every step is computed. The actual error of a reused step
is the distance between the output of the model and that of the uncached run at the same step, whose latents differ as
well by then.

    python -m benchmarks.quality_shadow
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cachedit_fx
from benchmarks.quality_models import load_setup
from benchmarks.quality_setup import Setup
from cachedit_fx import steps_mask
from cachedit_fx.forecasters import TaylorSeerCalibratorConfig

_FORECASTERS = {"last": None, "Taylor 1": TaylorSeerCalibratorConfig()}


def correlations(model: str = "digits", num_images: int = 40, batch: int = 10) -> list[dict[str, Any]]:
    """Returns Pearson's correlation of both errors over the reused steps of all calls, by mask and forecaster."""
    setup = load_setup(model, num_images, batch)
    torch.set_num_threads(1)
    plain = [_outputs(setup, number) for number in range(len(setup.calls))]
    found = []
    for policy in ("slow", "medium"):
        for name, forecaster in _FORECASTERS.items():
            fields = dict(
                Fn_compute_blocks=1,
                steps_computation_mask=steps_mask(total_steps=setup.num_steps, mask_policy=policy),
                steps_computation_policy="static",
                forecaster=forecaster,
                max_warmup_steps=0,
                inner_backend="eager",
            )
            predicted, actual = _both(setup, plain, fields)
            r = float(np.corrcoef(predicted, actual)[0, 1])
            found.append({"mask": policy, "forecaster": name, "steps": len(actual), "correlation": r})
    return found


def _both(setup: Setup, plain: list[list[Tensor]], fields: dict[str, Any]) -> tuple[list[float], list[float]]:
    predicted: dict[tuple[int, int], float] = {}  # By the numbers of the pipeline's and the transformer's call.
    actual: dict[tuple[int, int], float] = {}
    for shadow in (True, False):
        cachedit_fx.enable_cache(setup.pipe, **fields, shadow=shadow)
        for number, outputs in enumerate(plain):
            found = _outputs(setup, number)
            branches = cachedit_fx.summary(setup.pipe, logging=False)
            for branch, stats in enumerate(branches):  # Of a step, in the order of the calls.
                calls = {step: len(branches) * step + branch for step in range(stats.num_steps)}
                if shadow:
                    errors = {step: error.output for step, error in stats.errors.items() if error.reused}
                    predicted |= {(number, calls[step]): error for step, error in errors.items()}
                else:
                    for i in (calls[step] for step in stats.cached_steps):
                        actual[number, i] = float((found[i] - outputs[i]).norm() / outputs[i].norm())
        cachedit_fx.disable_cache(setup.pipe)
    both = [call for call in actual if call in predicted]
    return [predicted[call] for call in both], [actual[call] for call in both]


def _outputs(setup: Setup, number: int) -> list[Tensor]:
    """Returns the outputs of all calls of the transformer in a call of the pipeline."""
    found: list[Tensor] = []
    module: nn.Module = setup.pipe.transformer
    keep = torch._dynamo.disable(lambda _, __, output: found.append(output[0].clone()))
    handle = module.register_forward_hook(keep)
    try:
        setup.generate(number)
    finally:
        handle.remove()
    return found


if __name__ == "__main__":
    print(json.dumps(correlations(), indent=1))
