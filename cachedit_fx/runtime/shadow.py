"""Shadow mode: every step computes, and it is recorded what would have been reused and how far off that would be.

A step is run twice. The first run computes everything, and is the one whose output is returned; what is kept and
counted is what the policy decides, as if it were followed. The second run reuses the regions that the policy would
have reused (all of them, where it would have reused none), on the same inputs, and is compared with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cachedit_fx.runtime.snapshot import RegionState
from cachedit_fx.runtime.stats import StepError
from cachedit_fx.runtime.step import StepRun


@dataclass(slots=True)
class _Observed:
    """A region during the first run.

    Attributes:
        state: What was kept before the step, and whether it `fits` its shapes.
        reuses: What the policy decided.
        outputs: What left the region.
    """

    state: RegionState
    fits: bool
    reuses: bool
    outputs: tuple[torch.Tensor, ...] = ()


class ShadowedStep(StepRun):
    """The first run: decides as ever, and computes all the same."""

    __slots__ = ("_observed",)

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        computes = super().decide(region, probe_vector, streams)
        run = self._runs[region]
        if region == 0:
            self._observed: list[_Observed] = []
        self._observed.append(_Observed(run.state, run.fits, not computes))
        return True

    def cached(self, region: int) -> tuple[torch.Tensor | None, ...]:
        return (None,) * len(self._runs[region].plan.roles)

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        return after - before if after.shape == before.shape else None

    def observe(self, region: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Takes what leaves a region."""
        self._observed[region].outputs = outputs

    def compare(self, forward: Callable[..., Any], output: Any) -> None:
        """Runs the step again, reusing, and notes how far off every region and the model's output are."""
        observed = self._observed
        asked = [one.reuses for one in observed]
        reused = [one.fits and (one.reuses or not any(asked)) for one in observed]
        second = _Reusing(self, observed, reused)
        errors: list[StepError | None] = [None] * len(observed)
        if any(reused):
            again = forward(second, *self._args)
            of_output = _relative_l2(_floats(again), _floats(output))
            for i, one in enumerate(observed):
                if reused[i]:
                    pairs = zip(self._runs[i].plan.roles, second.outputs[i], one.outputs, strict=True)
                    streams = {role: _relative_l2([a], [b]) for role, a, b in pairs}
                    errors[i] = StepError(one.reuses, streams, of_output)
        for run, error in zip(self._runs, errors, strict=True):
            run.state = run.state._replace(errors=(*run.state.errors, error))


class _Reusing:
    """The second run: a `Step` that reuses what it is told to, and keeps nothing."""

    def __init__(self, first: ShadowedStep, observed: Sequence[_Observed], reused: Sequence[bool]) -> None:
        self._first, self._observed, self._reused = first, observed, reused
        self.outputs: list[tuple[torch.Tensor, ...]] = [()] * len(observed)

    def before(self, region: int) -> torch.Tensor:
        return self._first.before(region)

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        return not self._reused[region]

    def cached(self, region: int) -> tuple[torch.Tensor | None, ...]:
        run = self._first._runs[region]
        if not self._reused[region]:
            return (None,) * len(run.plan.roles)
        return self._first.reusable(run, self._observed[region].state)

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        return after

    def observe(self, region: int, outputs: tuple[torch.Tensor, ...]) -> None:
        self.outputs[region] = outputs

    def update(self, region: int, probe: torch.Tensor | None, cached: tuple[torch.Tensor | None, ...]) -> None:
        """Nothing: the first run kept what is to be kept."""


def _floats(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _relative_l2(reused: Iterable[torch.Tensor], computed: Iterable[torch.Tensor]) -> float:
    """|reused - computed| / |computed| over all tensors together, in float32; 0 where both are zero."""
    apart, size = 0.0, 0.0
    for one, other in zip(reused, computed, strict=True):
        apart += float((one.float() - other.float()).square().sum())
        size += float(other.float().square().sum())
    return (apart / size) ** 0.5 if size else (0.0 if not apart else float("inf"))
