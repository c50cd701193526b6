"""Intercepts the calls of the transformers and records what they returned at every step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
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
from cachedit_fx.tuning.scheduler_inputs import observed_inputs

_MISSING = object()
_NONLINEAR = 0.01  # The largest part of what a guidance branch adds (squared) that is not a linear combination.
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
    """The outputs of a generation, or of one guidance branch of it, reduced to what errors of forecasts depend on.

    Attributes:
        gram: Inner products of the outputs of the S steps, float64 [S, S].
        timesteps: The timesteps that were passed to the model; None if it takes none.
        joint: Inner products of the outputs, and of what the difference of two guidance branches adds to each of them,
            float64 [2 S, 2 S]; None unless there are two whose outputs guidance combines linearly.
        branches: Inner products of the outputs of each guidance branch, float64 [S, S], if `gram` is after guidance.
    """

    gram: NDArray[np.float64]
    timesteps: tuple[float, ...] | None
    joint: NDArray[np.float64] | None = None
    branches: tuple[NDArray[np.float64], ...] = ()


@dataclass
class _Branch:
    """What was recorded of a guidance branch: the outputs of its steps, their timesteps, and which module ran."""

    outputs: list[Tensor] = field(default_factory=list)  # Flat, float32 on the CPU.
    timesteps: list[float | None] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    @property
    def known_timesteps(self) -> tuple[float, ...] | None:
        known = tuple(moment for moment in self.timesteps if moment is not None)
        return known if len(known) == len(self.timesteps) else None


@dataclass
class Recorder:
    """Records one uncached generation.

    Attributes:
        modules: The transformers of the pipeline, by name.
        scheduler: The scheduler of the pipeline, if it has one. The model's outputs after guidance are recorded from
            the inputs of its `step`.
        max_bytes: The largest size of all outputs together, in bytes of float32.
        inputs: Shapes of the tensors that a transformer was called with first, by argument name.
        step_times: The time of each call of a transformer.

    Raises:
        ConfigError: When a transformer is called: the outputs are larger than `max_bytes`, or contain no floating-point
            tensor.
    """

    modules: Mapping[str, nn.Module]
    scheduler: Any
    max_bytes: int
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    step_times: list[StepTime] = field(default_factory=list)
    _branches: dict[int, _Branch] = field(default_factory=dict)
    _guided: list[Tensor] = field(default_factory=list)  # The outputs after guidance, one for each scheduler step.
    _is_one_per_step: bool = True  # Whether each guidance branch ran once before every scheduler step so far.
    _bytes: int = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(observed_inputs(self.scheduler, self._observe))
            entered = [
                stack.enter_context(handled(module, functools.partial(self._call, name)))
                for name, module in self.modules.items()
            ]
            yield
        self.inputs = next((steps.inputs for steps in entered if steps.inputs), {})

    def _call(self, name: str, step: Step, run: Callable[[], Any]) -> Any:
        module = self.modules[name]
        stopwatch = Stopwatch(device_of(module))
        returned = run()
        self.step_times.append(stopwatch.stop())
        found = floating(returned)
        if not found:
            raise ConfigError(
                f"cachedit_fx: {type(module).__name__} must return a floating-point tensor, alone or in a tuple, "
                f"list or output class, got {type(returned).__name__}"
            )
        branch = self._branches.setdefault(step.guidance_branch, _Branch())
        branch.outputs.append(self._recorded(found))
        branch.timesteps.append(step.timestep)
        branch.modules.append(name)
        return returned

    def _observe(self, output: Tensor) -> None:
        self._guided.append(self._recorded([output]))
        counts = {len(branch.outputs) for branch in self._branches.values()}
        self._is_one_per_step &= counts == {len(self._guided)}

    def _recorded(self, found: list[Tensor]) -> Tensor:
        self._bytes += sum(4 * tensor.numel() for tensor in found)
        if self._bytes > self.max_bytes:
            raise ConfigError(
                f"cachedit_fx: max_bytes must be at least the size of all outputs of one generation in float32, got "
                f"{self.max_bytes}, which was exceeded at step {self.num_steps}.\n"
                "What to do: pass calls with fewer or smaller images to tune, or a larger max_bytes if there is memory."
            )
        # A copy, because pipelines and schedulers may write into their tensors.
        return torch.cat([tensor.detach().float().flatten().cpu() for tensor in found])

    @property
    def num_steps(self) -> int:
        """The number of calls of the guidance branch that was called most often; 0 if the model was not called."""
        return max((len(branch.outputs) for branch in self._branches.values()), default=0)

    @property
    def num_guidance_branches(self) -> int:
        return len(self._branches)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Which transformer ran, and for how many steps, in the order in which they ran."""
        longest = max(self._branches.values(), key=lambda branch: len(branch.outputs), default=_Branch())
        return tuple((name, len([*steps])) for name, steps in itertools.groupby(longest.modules))

    @property
    def _is_guided_known(self) -> bool:
        """Whether the outputs after guidance are those of the steps of the model."""
        is_complete = self._is_one_per_step and len(self._guided) == self.num_steps
        return is_complete and len({len(output) for output in self._guided}) == 1

    @property
    def _joint(self) -> NDArray[np.float64] | None:
        """See `Trajectory.joint`. None if the runtime would not know that the branches belong together."""
        outputs = [branch.outputs for branch in self._branches.values()]
        sizes = {len(output) for each in (self._guided, *outputs) for output in each}
        is_request_known = isinstance(getattr(self.scheduler, "timesteps", None), Tensor)
        if len(outputs) != 2 or len(sizes) > 1 or not is_request_known:
            return None
        return joint_gram(_gram([*self._guided, *outputs[0], *outputs[1]]))

    def trajectories(self) -> list[Trajectory]:
        """Returns the trajectory of the outputs after guidance.

        All guidance branches compute and reuse the same steps with the same factors, so that the error after (linear)
        guidance is the same combination of outputs after guidance. If these are not known, because the pipeline has no
        scheduler or calls it otherwise, the result is one trajectory for each guidance branch that ran at every step.
        """
        found = []
        if self._is_guided_known:
            known = next(iter(self._branches.values())).known_timesteps
            alike = [branch.outputs for branch in self._branches.values() if len({*map(len, branch.outputs)}) == 1]
            found = [Trajectory(_gram(self._guided), known, self._joint, tuple(map(_gram, alike)))]
        else:
            for branch in self._branches.values():
                if len(branch.outputs) < self.num_steps or len({len(output) for output in branch.outputs}) > 1:
                    # A branch that runs in some steps only counts its own steps, so the mask would mean other steps.
                    continue
                found.append(Trajectory(_gram(branch.outputs), branch.known_timesteps))
        return found


def joint_gram(gram: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Returns `Trajectory.joint`; None unless the guided output is a linear combination of those of the branches.

    Args:
        gram: Inner products of the S guided outputs, the S outputs of the first branch and the S of the second one,
            float64 [3 S, 3 S].
    """
    num_steps = len(gram) // 3
    # Inner products of the three sequences, each as one vector.
    (whole, *with_whole), *among = np.einsum("isjs->ij", gram.reshape(3, num_steps, 3, num_steps))
    among = np.array(among)[:, 1:]
    factors = np.linalg.lstsq(among, np.array(with_whole), rcond=None)[0]
    missed = whole - factors @ np.array(with_whole)
    added = factors[1] ** 2 * (among[0, 0] - 2 * among[0, 1] + among[1, 1])
    if not added > 0 or missed > _NONLINEAR * added:
        return None
    same, none = np.eye(num_steps), np.zeros((num_steps, num_steps))
    parts = np.block([[same, none, none], [none, -factors[1] * same, factors[1] * same]])
    joint: NDArray[np.float64] = parts @ gram @ parts.T
    return joint


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
