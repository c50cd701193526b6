"""Intercepts the calls of a module and records what it returned at every step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachedit_fx.errors import ConfigError
from cachedit_fx.patterns.names import conditioning_names, timestep_name
from cachedit_fx.runtime.stopwatch import StepTime, Stopwatch

_MISSING = object()
_CHUNK = 1 << 20  # Number of values per output that are multiplied at once in float64.


@dataclass(frozen=True, slots=True)
class Step:
    """Identifies one call of the model.

    Attributes:
        guidance_branch: Number of the guidance branch, in the order of their first calls.
        number: Number of previous calls of this guidance branch in this generation.
        timestep: The timestep that was passed to the model; None if it takes none.
    """

    guidance_branch: int
    number: int
    timestep: float | None


Handler = Callable[[Step, Callable[[], Any]], Any]  # Receives a function that runs the model; returns the result.


class Steps:
    """Numbers the calls of one generation.

    A guidance branch is identified by its conditioning tensor. If a loop creates this tensor for every call, it is
    identified by the position of the call among the calls at one timestep.

    Attributes:
        inputs: Shapes of the tensors of the first call, by argument name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = list(inspect.signature(module.forward).parameters)
        self._timestep = timestep_name(self._names)
        self._conditioning = conditioning_names(self._names)
        self._guidance_branches: dict[int, tuple[int, Any]] = {}  # Holds the tensor, so that its id stays unique.
        self._numbers: dict[int, int] = {}
        self._last: tuple[float | None, int] = (math.nan, 0)  # The last timestep, and the number of its calls so far.
        self.inputs: dict[str, tuple[int, ...]] = {}

    def next(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Returns the step of a call with these arguments. Reads the timestep from the device."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if not self.inputs:
            tensors = {name: first_tensor(value) for name, value in given.items()}
            self.inputs = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        timestep = first_tensor(given.get(self._timestep or ""))
        moment = None if timestep is None else float(timestep.max())
        place = self._last[1] if moment == self._last[0] else 0
        self._last = (moment, place + 1)
        prompts = (first_tensor(given.get(name)) for name in self._conditioning)
        prompt = next((tensor for tensor in prompts if tensor is not None), None)
        guidance_branch = self._guidance_branches.get(id(prompt), (place if moment is not None else 0, None))[0]
        self._guidance_branches[id(prompt)] = (guidance_branch, prompt)
        number = self._numbers.get(guidance_branch, 0)
        self._numbers[guidance_branch] = number + 1
        return Step(guidance_branch, number, moment)


@contextlib.contextmanager
def handled(module: nn.Module, handler: Handler) -> Iterator[Steps]:
    """Passes every call of the module to `handler` for one generation, and restores the module afterwards."""
    before = module.__dict__.get("_compiled_call_impl", _MISSING)
    run = before if callable(before) else module._call_impl
    steps = Steps(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(steps.next(args, kwargs), lambda: run(*args, **kwargs))

    module._compiled_call_impl = call
    try:
        yield steps
    finally:
        if before is _MISSING:
            del module.__dict__["_compiled_call_impl"]
        else:
            module._compiled_call_impl = before


def first_tensor(value: Any) -> Tensor | None:
    """Returns a tensor, or the first tensor of a list, because some pipelines pass prompts as lists."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class Trajectory:
    """The outputs of a guidance branch in one generation, reduced to what errors of forecasts depend on.

    Attributes:
        gram: Inner products of the outputs of the S steps, float64 [S, S].
        timesteps: The timesteps that were passed to the model; None if it takes none.
    """

    gram: NDArray[np.float64]
    timesteps: tuple[float, ...] | None


@dataclass
class Recorder:
    """Records one uncached generation. The outputs stay on the CPU in float32 until `trajectories` is called.

    Attributes:
        module: The model.
        max_bytes: The largest size of all outputs together, in bytes of float32.
        inputs: Shapes of the tensors that the model was called with first, by argument name.
        step_times: The time of each call of the model.

    Raises:
        ConfigError: When the model is called: the outputs are larger than `max_bytes`, or contain no floating-point
            tensor.
    """

    module: nn.Module
    max_bytes: int
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    step_times: list[StepTime] = field(default_factory=list)
    _outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    _timesteps: dict[int, list[float | None]] = field(default_factory=dict)
    _bytes: int = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with handled(self.module, self._call) as steps:
            yield
        self.inputs = steps.inputs

    def _call(self, step: Step, run: Callable[[], Any]) -> Any:
        stopwatch = Stopwatch(device_of(self.module))
        returned = run()
        self.step_times.append(stopwatch.stop())
        found = floating(returned)
        if not found:
            raise ConfigError(
                f"cachedit_fx: {type(self.module).__name__} must return a floating-point tensor, alone or in a tuple, "
                f"list or output class, got {type(returned).__name__}"
            )
        self._bytes += sum(4 * tensor.numel() for tensor in found)
        if self._bytes > self.max_bytes:
            raise ConfigError(
                f"cachedit_fx: max_bytes must be at least the size of all outputs of one generation in float32, got "
                f"{self.max_bytes}, which was exceeded at step {step.number}.\n"
                "What to do: pass calls with fewer or smaller images to tune, or a larger max_bytes if there is memory."
            )
        flat = torch.cat([tensor.detach().float().flatten().cpu() for tensor in found])
        self._outputs.setdefault(step.guidance_branch, []).append(flat)
        self._timesteps.setdefault(step.guidance_branch, []).append(step.timestep)
        return returned

    @property
    def num_steps(self) -> int:
        """The number of calls of the guidance branch that was called most often; 0 if the model was not called."""
        return max(map(len, self._timesteps.values()), default=0)

    def trajectories(self) -> list[Trajectory]:
        """Returns one trajectory for each guidance branch that ran at every step, and releases the outputs."""
        found = []
        for guidance_branch, outputs in self._outputs.items():
            if len(outputs) < self.num_steps or len({len(output) for output in outputs}) > 1:
                # A branch that runs in some steps only counts its own steps, so the mask would mean other steps.
                continue
            moments = [moment for moment in self._timesteps[guidance_branch] if moment is not None]
            found.append(Trajectory(_gram(outputs), tuple(moments) if len(moments) == len(outputs) else None))
        self._outputs.clear()
        return found


def floating(returned: Any) -> list[Tensor]:
    """Returns the floating-point tensors of a model's output, in order."""
    leaves = pytree.tree_leaves(returned)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of the first weight of a module; the CPU if it has none."""
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _gram(outputs: list[Tensor]) -> NDArray[np.float64]:
    total = np.zeros((len(outputs), len(outputs)))
    for start in range(0, len(outputs[0]), _CHUNK):
        # In float64, because the error of a forecast is a small difference of large products.
        part = torch.stack([output[start : start + _CHUNK] for output in outputs]).double().numpy()
        total += part @ part.T
    return total
