"""One call of a guarded graph: look up the session, run the pieces, take what the step leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from cachedit_fx.config import CacheConfig
from cachedit_fx.policy import Decision, History, decide
from cachedit_fx.session import Instance, RegionState, Session, Snapshot, instance_of
from cachedit_fx.shapes import SizeRule, Sizes


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What the runtime knows of a region. Shapes: the residual's, then those of what is stored."""

    name: str
    sizes: SizeRule
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


class GuardedCall:
    """The function that Dynamo calls in place of its graph.

    Args:
        forward: The guarded graph's: takes a step and then the graph's arguments.
        weight: Position of the argument that tells module instances apart, or the tensor itself.
        conditioning: Position of the argument whose identity tells requests and guidance branches apart.
        copy_state: Copy what is kept: the inner compiler hands out buffers that it will write over (CUDA graphs).
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: CacheConfig,
        regions: Sequence[RegionPlan],
        *,
        weight: int | torch.Tensor,
        conditioning: int | None,
        copy_state: bool = False,
    ) -> None:
        self.forward = forward
        self.config = config
        self.regions = tuple(regions)
        self.weight = weight
        self.conditioning = conditioning
        self.copy_state = copy_state

    def __call__(self, *args: Any) -> Any:
        weight = args[self.weight] if isinstance(self.weight, int) else self.weight
        instance = instance_of(weight)
        conditioning = args[self.conditioning] if self.conditioning is not None else None
        step = StepRun(self, instance, instance.open(self.config, conditioning), args)
        output = self.forward(step, *args)
        step.commit()
        return output


def in_layout(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """`tensor` in these strides: a graph compiled later for the same shape may want another layout. Seldom a copy."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class StepRun:
    """One step of one session: the `Step` that a guarded graph asks. Changes nothing before `commit`."""

    __slots__ = (
        "_args",
        "_call",
        "_decided",
        "_fits",
        "_instance",
        "_is_new",
        "_kept",
        "_session",
        "_sizes",
        "_snapshot",
    )

    def __init__(self, call: GuardedCall, instance: Instance, session: Session, args: Sequence[Any]) -> None:
        self._call, self._instance, self._session, self._args = call, instance, session, args
        self._snapshot = session.snapshot
        self._is_new = False
        self._sizes: list[Sizes] = []
        self._fits: list[bool] = []
        self._decided: dict[int, tuple[Decision, History, float]] = {}
        self._kept: dict[str, RegionState] = {}

    def before(self, region: int) -> torch.Tensor:
        """The residual over the Fn blocks at the last computed step, or zeros: then nothing looks at the diff."""
        plan = self._call.regions[region]
        self._sizes.append(plan.sizes(self._args))
        self._fits.append(self._is_stored(region))
        state = self._state(region)
        if self._fits[region] and state.residual is not None:
            return in_layout(state.residual, self._sizes[region][0][1])
        shape, strides = self._sizes[region][0]
        return torch.empty_strided(shape, strides, dtype=plan.dtypes[0], device=plan.device).zero_()

    def decide(self, region: int, probe: torch.Tensor) -> bool:
        """Whether to compute. Reads the probe: the one time in a call (and region) that the host waits."""
        diff, *clock = probe.tolist()
        if clock:
            self._tick(clock[0])
        elif region == 0:
            self._tick(None)
        state = self._state(region)
        is_stored = self._fits[region] and state.residual is not None  # A new generation has let go of it.
        decision = decide(self._call.config, self._moved(state.history), diff, is_stored=is_stored)
        self._decided[region] = (decision, state.history, diff)
        return decision.compute

    def stored(self, region: int) -> tuple[torch.Tensor | None, ...]:
        if self._decided[region][0].compute:
            return (None,) * (len(self._call.regions[region].dtypes) - 1)
        kept = zip(self._state(region).stored, self._sizes[region][1:], strict=True)
        return tuple(in_layout(tensor, strides) for tensor, (_, strides) in kept)

    def keep(self, region: int, residual: torch.Tensor, stored: tuple[torch.Tensor, ...]) -> None:
        decision, history, diff = self._decided[region]
        state = self._state(region)
        if decision.compute:
            if self._call.copy_state:
                residual, stored = residual.clone(), tuple(tensor.clone() for tensor in stored)
            state = replace(state, residual=residual, stored=stored)
        self._kept[self._call.regions[region].name] = replace(
            state,
            history=history.after(decision, diff),
            decisions=(*state.decisions, decision),
            diffs=(*state.diffs, diff),
        )

    def commit(self) -> None:
        """Makes the step part of its session."""
        regions = MappingProxyType({**self._snapshot.regions, **self._kept})
        self._instance.commit(self._session, replace(self._snapshot, regions=regions), is_new_generation=self._is_new)

    def _state(self, region: int) -> RegionState:
        return self._snapshot.regions.get(self._call.regions[region].name) or RegionState()

    def _is_stored(self, region: int) -> bool:
        """Whether what is kept fits this call's shapes: a session may change size, and then nothing may be added."""
        state = self._state(region)
        if state.residual is None:
            return False
        plan = self._call.regions[region]
        kept = (state.residual, *state.stored)
        return len(kept) == len(plan.dtypes) and all(
            tensor.shape == size[0] and tensor.dtype == dtype and tensor.device == plan.device
            for tensor, size, dtype in zip(kept, self._sizes[region], plan.dtypes, strict=True)
        )

    def _tick(self, timestep: float | None) -> None:
        """Moves the session's clock. A timestep that turns back starts a new generation."""
        last, direction = self._snapshot.timestep, self._snapshot.direction
        if timestep is None:
            # Without a clock only a request with a name is known to be one generation.
            self._snapshot = replace(self._snapshot, direction=int(self._session.is_named))
            return
        turn = 0 if last is None or math.isnan(timestep) else (timestep > last) - (timestep < last)
        if turn and direction and turn != direction:
            self._is_new = True
            self._snapshot, turn, direction = Snapshot(), 0, 0
        self._snapshot = replace(self._snapshot, timestep=timestep, direction=turn or direction)

    def _moved(self, history: History) -> History:
        return replace(history, has_moved=self._snapshot.direction != 0)
