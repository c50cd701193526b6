"""Simulates a schedule without compiling: at reused steps, the forward of the model is replaced by a forecast.

The result is that of the runtime with a configuration that reuses the whole output of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachedit_fx.forecasters.compile import EagerForecaster
from cachedit_fx.forecasters.forecaster import LinearForecaster
from cachedit_fx.forecasters.verdict import is_gap
from cachedit_fx.runtime.cached_values import NONE_REUSED, CachedValue, Forecast, Reused
from cachedit_fx.tuning.recording import Step, handled
from cachedit_fx.tuning.schedule import Schedule

_SUM = EagerForecaster(LinearForecaster())  # As in the runtime, a weighted sum of two outputs.


@dataclass
class _GuidanceBranch:
    """The state of one guidance branch, which corresponds to the state of a region in the runtime."""

    cached: list[CachedValue] = field(default_factory=list)  # One per floating-point tensor of the output.
    reused: Reused = ((), ())
    timesteps: list[float | None] = field(default_factory=list)
    differences: list[CachedValue] = field(default_factory=list)  # From the first branch, at steps both computed.
    is_outdated: bool = False  # Whether steps were skipped since the newest computed step.
    returned: Any = None  # What the model returned at the newest computed step.


@dataclass
class Simulation:
    """Runs a transformer with a schedule, for one generation.

    Attributes:
        module: The transformer.
        schedule: The schedule of its steps.
        num_computed: The number of calls in which the model ran.
        num_calls: The number of all calls.
    """

    module: nn.Module
    schedule: Schedule
    num_computed: int = 0
    num_calls: int = 0
    _guidance_branches: dict[int, _GuidanceBranch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._forecast = Forecast(self.schedule.forecaster, EagerForecaster(self.schedule.forecaster))

    @contextlib.contextmanager
    def simulating(self) -> Iterator[None]:
        with handled(self.module, self._call):
            yield

    def _call(self, step: Step, run: Callable[[], Any]) -> Any:
        guidance_branch = self._guidance_branches.setdefault(step.guidance_branch, _GuidanceBranch())
        guidance_branch.timesteps.append(step.timestep)
        guidance_branch.is_outdated |= is_gap(guidance_branch.timesteps)
        now = position(self.schedule.forecaster.by, step.number, step.timestep, guidance_branch.timesteps[0])
        self.num_calls += 1
        if (
            step.number in self.schedule.computed
            or step.number >= self.schedule.num_steps
            or not guidance_branch.cached
        ):
            if self._is_guided(step, guidance_branch):
                return self._compute(guidance_branch, now, self._guided(guidance_branch, now))
            self.num_computed += 1
            returned = self._compute(guidance_branch, now, run())
            if self.schedule.guided and step.guidance_branch:
                self._update_differences(guidance_branch, now)
            return returned
        leaves, spec = pytree.tree_flatten(guidance_branch.returned)
        cached = iter(guidance_branch.cached)
        values = [self._value(next(cached), guidance_branch, now) if _is_floating(leaf) else leaf for leaf in leaves]
        since, between = guidance_branch.reused
        guidance_branch.reused = (*since, now), between
        return pytree.tree_unflatten(values, spec)

    def _is_guided(self, step: Step, guidance_branch: _GuidanceBranch) -> bool:
        return step.guidance_branch > 0 and step.number in self.schedule.guided and bool(guidance_branch.differences)

    def _guided(self, guidance_branch: _GuidanceBranch, now: float) -> Any:
        """Returns the output of a guided step: that of the first branch plus the forecast of the difference."""
        leaves, spec = pytree.tree_flatten(guidance_branch.returned)
        outdated = guidance_branch.is_outdated
        forecasts = [v.at(now, NONE_REUSED, self._forecast, is_outdated=outdated) for v in guidance_branch.differences]
        values = map(_summed, [value.last for value in self._guidance_branches[0].cached], forecasts)
        return pytree.tree_unflatten([next(values) if _is_floating(leaf) else leaf for leaf in leaves], spec)

    def _update_differences(self, guidance_branch: _GuidanceBranch, now: float) -> None:
        lasts = [[value.last for value in of.cached] for of in (guidance_branch, self._guidance_branches[0])]
        tensors = [_summed(own, first, -1.0) for own, first in zip(*lasts, strict=True)]
        before = guidance_branch.differences or [CachedValue()] * len(tensors)
        guidance_branch.differences = [
            old.with_value(tensor, now, NONE_REUSED, self._forecast, is_static=True)
            for old, tensor in zip(before, tensors, strict=True)
        ]

    def _value(self, cached: CachedValue, guidance_branch: _GuidanceBranch, now: float) -> Tensor:
        value = cached.at(now, guidance_branch.reused, self._forecast, is_outdated=guidance_branch.is_outdated)
        assert value is not None
        return value.clone() if value is cached.last else value  # A pipeline may write into what the model returned.

    def _compute(self, guidance_branch: _GuidanceBranch, now: float, returned: Any) -> Any:
        tensors = [leaf.clone() for leaf in pytree.tree_leaves(returned) if _is_floating(leaf)]
        is_continued = guidance_branch.cached and not guidance_branch.is_outdated
        before = guidance_branch.cached if is_continued else [CachedValue()] * len(tensors)
        guidance_branch.cached = [
            old.with_value(tensor, now, guidance_branch.reused, self._forecast, is_static=True)
            for old, tensor in zip(before, tensors, strict=True)
        ]
        guidance_branch.reused = (), guidance_branch.reused[0] if is_continued else ()
        guidance_branch.is_outdated, guidance_branch.returned = False, returned
        return returned


def position(by: str, number: int, timestep: float | None, first: float | None) -> float:
    """Returns the position of a step as in `Times`: its number, or the distance from the first timestep."""
    if by == "step" or timestep is None or first is None:
        return float(number)
    return abs(timestep - first)


def _summed(one: Tensor | None, other: Tensor | None, factor: float = 1.0) -> Tensor:
    """Returns one + factor * other, rounded as in the runtime."""
    assert one is not None and other is not None
    return _SUM.predict((one, other), (1.0, factor))


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
