"""The solvers of diffusers for flow matching, with the noise levels of the pipeline's own scheduler.

`LEVELS` is for pipelines that pass the noise levels to the scheduler (FLUX), `STEPS` for pipelines that pass only the
number of steps (Wan). Both map a name to a function from the pipeline's own scheduler to the one that replaces it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

Solvers = Mapping[str, Callable[[Any], Any]]
MOST_NOISE = 0.999  # Where the multistep solvers of diffusers begin: they take the logarithm of 1 - sigma.


def sigmas_of(euler: Any, num_steps: int | None, device: Any, sigmas: Any, mu: float | None) -> Tensor:
    """Returns the noise levels of the pipeline's own scheduler, [steps + 1]; the last one is 0."""
    if sigmas is None:
        assert num_steps is not None
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    euler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
    levels: Tensor = euler.sigmas.clone()
    return levels


class _FromLevels:
    """A scheduler that replaces `euler`, whose noise levels it uses."""

    euler: Any

    @classmethod
    def of(cls, euler: Any, **config: Any) -> Any:
        made = cls(**config)
        made.euler = copy.deepcopy(euler)
        return made


class Heun(_FromLevels, FlowMatchHeunDiscreteScheduler):
    """Heun's method, which calls the model twice at every step except the last one."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        levels = sigmas_of(self.euler, num_inference_steps, device, sigmas, mu)
        super().set_timesteps(len(levels) - 1, device)
        once = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2)])
        self.timesteps = once * self.config.num_train_timesteps
        self.sigmas = torch.cat([once, levels[-1:]])


class _Multistep(_FromLevels):
    """The common base of the two multistep solvers. Unlike those of diffusers, its timesteps are not integers."""

    config: Any

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        levels = sigmas_of(self.euler, num_inference_steps, device, sigmas, mu).clamp_max(MOST_NOISE)
        super().set_timesteps(len(levels) - 1, device)  # type: ignore[misc]
        self.sigmas = levels
        self.timesteps = levels[:-1] * self.config.num_train_timesteps


class Dpm(_Multistep, DPMSolverMultistepScheduler):
    """DPM++ 2M."""


class UniPC(_Multistep, UniPCMultistepScheduler):
    """UniPC of order 2."""


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
LEVELS: Solvers = {
    "euler": copy.deepcopy,
    "heun": Heun.of,
    "dpm++ 2m": lambda own: Dpm.of(own, **_FLOW),
    "unipc": lambda own: UniPC.of(own, **_FLOW),
}
STEPS: Solvers = {
    "unipc": copy.deepcopy,
    "euler": lambda own: FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift),
    "heun": lambda own: FlowMatchHeunDiscreteScheduler(shift=own.config.flow_shift),
    "dpm++ 2m": lambda own: DPMSolverMultistepScheduler(flow_shift=own.config.flow_shift, **_FLOW),
}


def calls_of(name: str, num_steps: int) -> int:
    """Returns the number of calls of the model, for each guidance branch, in this number of steps."""
    return 2 * num_steps - 1 if name == "heun" else num_steps
