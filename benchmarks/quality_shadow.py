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
from benchmarks.quality_setup import Setup, load_setup
from cachedit_fx import steps_mask
from cachedit_fx.forecasters import TaylorSeerCalibratorConfig

_FORECASTERS = {"last": None, "Taylor 1": TaylorSeerCalibratorConfig()}


def correlations(pipeline: str = "digits", num_images: int = 40, batch: int = 10) -> list[dict[str, Any]]:
    """Returns Pearson's correlation of both errors over the reused steps of all calls, by mask and forecaster."""
    setup = load_setup(pipeline, num_images, batch)
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
            foretold, real = _both(setup, plain, fields)
            r = float(np.corrcoef(foretold, real)[0, 1])
            found.append({"mask": policy, "forecaster": name, "steps": len(real), "correlation": r})
    return found


def _both(setup: Setup, plain: list[list[Tensor]], fields: dict[str, Any]) -> tuple[list[float], list[float]]:
    foretold: list[dict[int, float]] = []
    real: list[dict[int, float]] = []
    for shadow in (True, False):
        cachedit_fx.enable_cache(setup.pipe, **fields, shadow=shadow)
        for number, outputs in enumerate(plain):
            found = _outputs(setup, number)
            (stats,) = cachedit_fx.summary(setup.pipe, logging=False)
            if shadow:
                foretold.append({step: error.output for step, error in stats.errors.items() if error.reused})
            else:
                far = {i: float((found[i] - outputs[i]).norm() / outputs[i].norm()) for i in stats.cached_steps}
                real.append(far)
        cachedit_fx.disable_cache(setup.pipe)
    steps = [(call, step) for call, far in enumerate(real) for step in far if step in foretold[call]]
    return [foretold[call][step] for call, step in steps], [real[call][step] for call, step in steps]


def _outputs(setup: Setup, number: int) -> list[Tensor]:
    """Returns the output of the transformer at every step of a call."""
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
