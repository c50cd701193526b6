"""Runs the given calls without the cache and records them for the search."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
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
        module: The transformer that the calls run.
        outputs: The images that each call returned, float32 on the CPU, [images, ...].
        recorded: The recorded runs, one per call and guidance branch.
        inputs: Shapes of the tensors that the transformer was called with first, by argument name.
        pace: The time of a generation and of a step.
    """

    module: nn.Module
    outputs: list[Tensor]
    recorded: list[RecordedRun]
    inputs: dict[str, tuple[int, ...]]
    pace: Pace


def record(pipe: Any, calls: Sequence[Call], max_bytes: int) -> Recording:
    """Runs every call once and records it.

    Args:
        pipe: The pipeline.
        calls: The calls to run.
        max_bytes: The largest size of the outputs of the model in one generation, in bytes of float32.

    Raises:
        ConfigError: The pipeline is cached or compiled, the number of transformers that it runs is not one, or the
            calls differ in their number of steps.
    """
    modules = transformers_of(pipe)
    for name, module in modules.items():
        _require_uncached(name, module)
    outputs: list[Tensor] = []
    recorded: list[RecordedRun] = []
    used: dict[str, Recorder] = {}
    lengths: list[int] = []
    others: list[float] = []  # Seconds that the pipeline spends outside of its model.
    step_times: list[float] = []
    for call in calls:
        recorders = {name: Recorder(module, max_bytes) for name, module in modules.items()}
        with ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder.recording())
            start = time.perf_counter()
            outputs.append(call.run(pipe))  # The result is on the CPU, so the accelerator has finished.
            seconds = time.perf_counter() - start
        used |= {name: recorder for name, recorder in recorders.items() if recorder.num_steps}
        if len(used) != 1:
            raise ConfigError(
                "cachedit_fx: the pipeline must run one transformer, once per step and guidance branch, and the calls "
                f"ran {' and '.join(used) or 'none'} of {', '.join(modules)}.\n"
                "What to do: if it runs several, give each a mask with BlockAdapter and ParamsModifier instead."
            )
        (recorder,) = used.values()
        lengths.append(recorder.num_steps)
        in_model = [step_time.seconds for step_time in recorder.step_times]
        others.append(max(0.0, seconds - sum(in_model)))
        step_times += in_model
        for trajectory in recorder.trajectories():
            weights = weights_of(getattr(pipe, "scheduler", None), trajectory.timesteps, recorder.num_steps)
            recorded.append(RecordedRun(trajectory, weights))
    if len({*lengths}) > 1 or lengths[0] <= NUM_FIRST:
        raise ConfigError(
            f"cachedit_fx: calls must all have the same number of steps, more than {NUM_FIRST}, got {shown(lengths)}"
        )
    step = statistics.median(step_times) * len(step_times) / sum(lengths)
    generation = statistics.median(others) + step * lengths[0]
    return Recording(recorder.module, outputs, recorded, recorder.inputs, Pace(generation, step, lengths[0]))


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
