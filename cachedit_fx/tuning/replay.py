"""A schedule without the compiler: the model's forward is left out at reused steps, and its output forecast.

What reuses the model's whole output does in the runtime what this does around the forward; nothing has to be compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachedit_fx.forecasters.forecaster import Times
from cachedit_fx.tuning.record import Step, handled
from cachedit_fx.tuning.schedule import Schedule


@dataclass
class _Branch:
    """What a guidance branch keeps: per floating tensor of the output a history, newest first."""

    histories: list[tuple[Tensor, ...]] = field(default_factory=list)
    computed: tuple[float, ...] = ()
    reused: tuple[float, ...] = ()
    first: float | None = None
    returned: Any = None  # At the newest computed step: what holds the tensors.


@dataclass
class Replay:
    """Runs one generation by a schedule.

    Attributes:
        num_computed, num_calls: How often the model ran and was called.
    """

    module: nn.Module
    schedule: Schedule
    num_computed: int = 0
    num_calls: int = 0
    _branches: dict[int, _Branch] = field(default_factory=dict)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        with handled(self.module, self._call):
            yield

    def _call(self, step: Step, run: Callable[[], Any]) -> Any:
        kept = self._branches.setdefault(step.branch, _Branch())
        if kept.first is None:
            kept.first = step.timestep
        forecaster = self.schedule.forecaster
        now = position(forecaster.by, step.number, step.timestep, kept.first)
        times = Times(kept.computed, now, kept.reused)
        self.num_calls += 1
        if step.number in self.schedule.computed or step.number >= self.schedule.num_steps or not kept.computed:
            self.num_computed += 1
            return self._compute(kept, times, run())
        leaves, spec = pytree.tree_flatten(kept.returned)
        histories = iter(kept.histories)
        numbers = [*forecaster.numbers(times)]
        made = [
            forecaster.predict(next(histories), torch.tensor(numbers, dtype=torch.float32, device=leaf.device))
            if _is_floating(leaf)
            else leaf
            for leaf in leaves
        ]
        kept.reused = (*kept.reused, now)
        return pytree.tree_unflatten(made, spec)

    def _compute(self, kept: _Branch, times: Times, returned: Any) -> Any:
        forecaster = self.schedule.forecaster
        tensors = [leaf for leaf in pytree.tree_leaves(returned) if _is_floating(leaf)]
        histories = kept.histories or [()] * len(tensors)
        ages = [times.now - moment for moment in times.computed]
        kept.histories = [
            # A copy: a pipeline may write into what the model returned.
            forecaster.update(history, tensor.clone(), torch.tensor(ages, dtype=torch.float32, device=tensor.device))
            for history, tensor in zip(histories, tensors, strict=True)
        ]
        kept.computed = (times.now, *times.computed)[: forecaster.depth]
        kept.reused = ()
        kept.returned = returned
        return returned


def position(by: str, number: int, timestep: float | None, first: float | None) -> float:
    """Where a step stands, for `Times`: its number, or how far the timestep has moved."""
    if by == "step" or timestep is None or first is None:
        return float(number)
    return abs(timestep - first)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
