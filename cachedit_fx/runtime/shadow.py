"""Shadow mode: every step computes, and records what would have been reused and how large the error would be.

A step runs twice. The first run computes everything, and its output is returned. The cached values and the statistics
are those of the decisions of the policy, as if they were followed. The second run, on the same inputs, reuses the
regions that the policy would have reused, or all regions if it would have reused none. It is compared with the first
run.
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
        state: The state of the region before the step.
        fits: Whether its cached values have the shapes of the step, on all ranks that run the region.
        reuses: The decision of the policy.
        outputs: The live-outs of the region.
    """

    state: RegionState
    fits: bool
    reuses: bool
    outputs: tuple[torch.Tensor, ...] = ()


class ShadowedStep(StepRun):
    """The first run, which records the decisions and always computes."""

    __slots__ = ("_observed",)

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        computes = super().decide(region, probe_vector, streams)
        run = self._runs[region]
        if region == 0:
            self._observed: list[_Observed] = []
        self._observed.append(_Observed(run.state, run.fits and run.is_agreed, not computes))
        return True

    def cached(self, region: int) -> tuple[torch.Tensor | None, ...]:
        return (None,) * len(self._runs[region].plan.roles)

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        return after - before if after.shape == before.shape else None

    def observe(self, region: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Records the live-outs of a region."""
        self._observed[region].outputs = outputs

    def compare(self, forward: Callable[..., Any], output: Any) -> None:
        """Runs the step again, reusing, and records the errors of all regions and of the output of the model."""
        observed = self._observed
        would_reuse = [one.reuses for one in observed]
        reused = [one.fits and (one.reuses or not any(would_reuse)) for one in observed]
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
    """The second run: a `Step` that reuses the given regions, and stores nothing."""

    def __init__(self, first: ShadowedStep, observed: Sequence[_Observed], reused: Sequence[bool]) -> None:
        self._first, self._observed, self._reused = first, observed, reused
        self.outputs: list[tuple[torch.Tensor, ...]] = [()] * len(observed)

    def before(self, region: int) -> torch.Tensor:
        return self._first.before(region)

    def fingerprint(self, region: int) -> torch.Tensor:
        return self._first.fingerprint(region)  # The second run decides nothing, but its head has the exchange, too.

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
        """Does nothing, since the first run has stored everything."""


def _floats(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _relative_l2(reused: Iterable[torch.Tensor], computed: Iterable[torch.Tensor]) -> float:
    """|reused - computed| / |computed| over all tensors together, in float32; 0 where both are zero."""
    difference, size = 0.0, 0.0
    for one, other in zip(reused, computed, strict=True):
        difference += float((one.float() - other.float()).square().sum())
        size += float(other.float().square().sum())
    return (difference / size) ** 0.5 if size else (0.0 if not difference else float("inf"))
