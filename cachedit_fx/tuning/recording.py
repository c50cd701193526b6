"""What a model returned at every step: a call of the model is taken in hand without a word about the model."""

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
from cachedit_fx.runtime.stopwatch import PieceTime, Stopwatch

_MISSING = object()
_CHUNK = 1 << 20  # Values of an output that are multiplied at once in float64.


@dataclass(frozen=True, slots=True)
class Step:
    """Which call of the model this is.

    Attributes:
        guidance_branch: Number of the guidance branch, in the order in which they are first called.
        number: How many calls of this branch went before, in this generation.
        timestep: What the model was given; None where it takes none.
    """

    guidance_branch: int
    number: int
    timestep: float | None


Handler = Callable[[Step, Callable[[], Any]], Any]  # Is given what runs the model, and returns what the call returns.


class Steps:
    """Numbers the calls of one generation.

    A branch is told by its conditioning tensor; where loops build that anew at every call, by the place among the calls
    at one timestep.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = list(inspect.signature(module.forward).parameters)
        self._timestep = timestep_name(self._names)
        self._conditioning = conditioning_names(self._names)
        self._guidance_branches: dict[int, tuple[int, Any]] = {}  # With the tensor, so that no other one gets its id.
        self._numbers: dict[int, int] = {}
        self._last: tuple[float | None, int] = (math.nan, 0)  # Timestep, and how many calls it had so far.
        self.inputs: dict[str, tuple[int, ...]] = {}

    def next(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """The step that a call with these arguments is. Reads the timestep from the device."""
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
    """Hands every call of the module to `handler`, for one generation; then all is as before."""
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
    """A tensor, or the first of a list of them, as prompts are handed over by some."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class Trajectory:
    """What a guidance branch returned in one generation, as far as errors of forecasts depend on it.

    Attributes:
        gram: Inner products of the steps' outputs, float64 [S, S].
        timesteps: What the model was given; None where it takes none.
    """

    gram: NDArray[np.float64]
    timesteps: tuple[float, ...] | None


@dataclass
class Recorder:
    """Takes in one uncached generation. Outputs lie on the CPU in float32 until `trajectories` is asked for.

    Attributes:
        max_bytes: Of all outputs together.
        inputs: Shapes of what the model was given at its first call.

    Raises:
        ConfigError: (when the model is called) the outputs are larger, or hold no floating tensor.
    """

    module: nn.Module
    max_bytes: int
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    piece_times: list[PieceTime] = field(default_factory=list)
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
        self.piece_times.append(stopwatch.stop())
        found = floating(returned)
        if not found:
            raise ConfigError(
                f"cachedit_fx: {type(self.module).__name__} must return a floating tensor, alone or in a tuple, list "
                f"or output class, got {type(returned).__name__}"
            )
        self._bytes += sum(4 * tensor.numel() for tensor in found)
        if self._bytes > self.max_bytes:
            raise ConfigError(
                f"cachedit_fx: max_bytes must be at least what one generation's outputs take in float32, got "
                f"{self.max_bytes}, passed at step {step.number}.\n"
                "What to do: give tune fewer images per call or a smaller size, or max_bytes=... if there is memory."
            )
        flat = torch.cat([tensor.detach().float().flatten().cpu() for tensor in found])
        self._outputs.setdefault(step.guidance_branch, []).append(flat)
        self._timesteps.setdefault(step.guidance_branch, []).append(step.timestep)
        return returned

    @property
    def num_steps(self) -> int:
        """Of the branch that was called most often; 0 if the model was not called."""
        return max(map(len, self._timesteps.values()), default=0)

    def trajectories(self) -> list[Trajectory]:
        """One per branch that took part in every step. Lets go of the outputs."""
        found = []
        for guidance_branch, outputs in self._outputs.items():
            if len(outputs) < self.num_steps or len({len(output) for output in outputs}) > 1:
                continue  # Guidance in some steps only: the mask counts its own steps, so other ones are meant.
            moments = [moment for moment in self._timesteps[guidance_branch] if moment is not None]
            found.append(Trajectory(_gram(outputs), tuple(moments) if len(moments) == len(outputs) else None))
        self._outputs.clear()
        return found


def floating(returned: Any) -> list[Tensor]:
    """The floating tensors of what a model returns, in order."""
    leaves = pytree.tree_leaves(returned)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def device_of(module: nn.Module) -> torch.device:
    """Where its first weight lies; the CPU if it has none."""
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _gram(outputs: list[Tensor]) -> NDArray[np.float64]:
    total = np.zeros((len(outputs), len(outputs)))
    for start in range(0, len(outputs[0]), _CHUNK):
        # float64: what a forecast misses is a small difference of large products.
        part = torch.stack([output[start : start + _CHUNK] for output in outputs]).double().numpy()
        total += part @ part.T
    return total
