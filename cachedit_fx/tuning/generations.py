"""Runs the given calls without the cache and records them for the search."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.frontend.torch_internals import OptimizedModule
from cachedit_fx.integrations.block_adapter import transformers_of
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.problems import RecordedRun, weights_of
from cachedit_fx.tuning.recording import Recorder
from cachedit_fx.tuning.schedule import NUM_FIRST
from cachedit_fx.tuning.search import Pace


@dataclass(frozen=True)
class Recording:
    """The recorded calls.

    Attributes:
        modules: The transformers that the calls run, by name.
        parts: Which transformer runs, and for how many steps, in the order in which they run.
        outputs: The images that each call returned, float32 on the CPU, [images, ...].
        recorded: The recorded runs, at least one per call.
        inputs: Shapes of the tensors that a transformer was called with first, by argument name.
        pace: The time of a generation and of a step.
        num_guidance_branches: The number of guidance branches.
    """

    modules: dict[str, nn.Module]
    parts: tuple[tuple[str, int], ...]
    outputs: list[Tensor]
    recorded: list[RecordedRun]
    inputs: dict[str, tuple[int, ...]]
    pace: Pace
    num_guidance_branches: int = 1

    @property
    def starts(self) -> tuple[int, ...]:
        """The first step of each transformer."""
        return tuple(itertools.accumulate((count for _, count in self.parts[:-1]), initial=0))


def record(pipe: Any, calls: Sequence[Call], max_bytes: int) -> Recording:
    """Runs every call once and records it.

    Args:
        pipe: The pipeline.
        calls: The calls to run.
        max_bytes: The largest size of the outputs of the model in one generation, in bytes of float32.

    Raises:
        ConfigError: The pipeline is cached or compiled, its transformers take turns in another way than one after the
            other, its outputs change their size, or the calls differ in the number of steps of a transformer.
    """
    modules = transformers_of(pipe)
    for name, module in modules.items():
        _require_uncached(name, module)
    scheduler = getattr(pipe, "scheduler", None)
    outputs: list[Tensor] = []
    recorded: list[RecordedRun] = []
    parts: list[tuple[tuple[str, int], ...]] = []
    others: list[float] = []  # Seconds that the pipeline spends outside of its model.
    step_times: list[float] = []
    for call in calls:
        recorder = Recorder(modules, scheduler, max_bytes)
        with recorder.recording():
            start = time.perf_counter()
            outputs.append(call.run(pipe))  # The result is on the CPU, so the accelerator has finished.
            seconds = time.perf_counter() - start
        parts.append(recorder.parts)
        _require_in_turn(recorder.parts, modules)
        in_model = [step_time.seconds for step_time in recorder.step_times]
        others.append(max(0.0, seconds - sum(in_model)))
        step_times += in_model
        for trajectory in recorder.trajectories():
            weights = weights_of(scheduler, trajectory.timesteps, recorder.num_steps)
            recorded.append(RecordedRun(trajectory, weights))
    lengths = [sum(count for _, count in each) for each in parts]
    if len({*parts}) > 1 or lengths[0] <= NUM_FIRST:
        given = lengths if len(parts[0]) == 1 else [dict(each) for each in parts]
        raise ConfigError(
            f"cachedit_fx: calls must all have the same number of steps, more than {NUM_FIRST}, got {shown(given)}"
        )
    if not recorded:
        raise ConfigError(
            "cachedit_fx: what a transformer returns must have the same size at every step of a generation, got "
            f"outputs of different sizes from {', '.join(name for name, _ in parts[0])}"
        )
    step = statistics.median(step_times) * len(step_times) / sum(lengths)
    generation = statistics.median(others) + step * lengths[0]
    run = {name: modules[name] for name, _ in parts[0]}
    pace = Pace(generation, step, lengths[0])
    return Recording(run, parts[0], outputs, recorded, recorder.inputs, pace, recorder.num_guidance_branches)


def _require_in_turn(parts: Sequence[tuple[str, int]], modules: Mapping[str, nn.Module]) -> None:
    names = [name for name, _ in parts]
    if not names or len({*names}) < len(names):
        raise ConfigError(
            "cachedit_fx: the pipeline must run its transformers one after the other, and a call ran "
            f"{', '.join(names[:4]) or 'none'} of {', '.join(modules)}.\n"
            "What to do: give each transformer a mask with BlockAdapter and ParamsModifier instead."
        )


def _require_uncached(name: str, module: nn.Module) -> None:
    if isinstance(module, OptimizedModule):
        raise ConfigError(
            f"cachedit_fx: {name} must not be wrapped by torch.compile, got an OptimizedModule; pass the module that "
            "torch.compile was given"
        )
    if getattr(module, "is_cache_enabled", False) or module.__dict__.get("_compiled_call_impl") is not None:
        raise ConfigError(
            f"cachedit_fx: {name} must be neither cached nor compiled, got a {type(module).__name__} that is; call "
            "disable_cache() first, and compile after tune"
        )
