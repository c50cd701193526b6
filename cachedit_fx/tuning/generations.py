"""The given calls, recorded: from them all searching starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.integrations.block_adapter import transformers_of
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.problems import RecordedRun, weights_of
from cachedit_fx.tuning.recording import Recorder
from cachedit_fx.tuning.schedule import NUM_FIRST
from cachedit_fx.tuning.search import Pace


@dataclass(frozen=True)
class Recording:
    """The calls, uncached.

    Attributes:
        module: The transformer that they run.
        outputs: What each returned.
        inputs: Shapes of what the transformer was given at first.
    """

    module: nn.Module
    outputs: list[Tensor]
    recorded: list[RecordedRun]
    inputs: dict[str, tuple[int, ...]]
    pace: Pace


def record(pipe: Any, calls: Sequence[Call], max_bytes: int) -> Recording:
    """Runs every call once.

    Raises:
        ConfigError: The pipeline is cached or compiled, does not run one transformer, or the calls differ in length.
    """
    modules = transformers_of(pipe)
    for name, module in modules.items():
        _require_uncached(name, module)
    outputs: list[Tensor] = []
    recorded: list[RecordedRun] = []
    used: dict[str, Recorder] = {}
    lengths: list[int] = []
    others: list[float] = []  # Seconds of the pipeline beside its model.
    piece_times: list[float] = []
    for call in calls:
        recorders = {name: Recorder(module, max_bytes) for name, module in modules.items()}
        with ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder.recording())
            start = time.perf_counter()
            outputs.append(call.run(pipe))  # On the CPU, so that an accelerator is done.
            seconds = time.perf_counter() - start
        used |= {name: recorder for name, recorder in recorders.items() if recorder.num_steps}
        if len(used) != 1:
            raise ConfigError(
                "cachedit_fx: calls must be of a pipeline that runs one transformer, once per step and branch, "
                f"got {' and '.join(used) or 'none'} of {', '.join(modules)}.\n"
                "What to do: for several, give each a mask of its own by BlockAdapter and ParamsModifier."
            )
        (recorder,) = used.values()
        lengths.append(recorder.num_steps)
        in_model = [piece_time.seconds for piece_time in recorder.piece_times]
        others.append(max(0.0, seconds - sum(in_model)))
        piece_times += in_model
        for trajectory in recorder.trajectories():
            weights = weights_of(getattr(pipe, "scheduler", None), trajectory.timesteps, recorder.num_steps)
            recorded.append(RecordedRun(trajectory, weights))
    if len({*lengths}) > 1 or lengths[0] <= NUM_FIRST:
        raise ConfigError(
            f"cachedit_fx: calls must all have one number of steps, more than {NUM_FIRST}, got {shown(lengths)}"
        )
    step = statistics.median(piece_times) * len(piece_times) / sum(lengths)
    generation = statistics.median(others) + step * lengths[0]
    return Recording(recorder.module, outputs, recorded, recorder.inputs, Pace(generation, step, lengths[0]))


def _require_uncached(name: str, module: nn.Module) -> None:
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise ConfigError(
            f"cachedit_fx: {name} must not be wrapped by torch.compile, got one; give it as it was before"
        )
    if getattr(module, "is_cache_enabled", False) or module.__dict__.get("_compiled_call_impl") is not None:
        raise ConfigError(
            f"cachedit_fx: {name} must be neither cached nor compiled, got one that is; call disable_cache() first, "
            "and compile after tune"
        )
