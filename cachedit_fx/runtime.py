"""One call of a guarded graph: look up the session, run the pieces, take what the step leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from cachedit_fx.clock import Stopwatch
from cachedit_fx.config import CacheConfig, Changes
from cachedit_fx.session import current_call, instance_of
from cachedit_fx.shadow import ShadowedStep
from cachedit_fx.step import Policy, RegionPlan, StepRun


class GuardedCall:
    """The function that Dynamo calls in place of its graph.

    Args:
        forward: The guarded graph's: takes a step and then the graph's arguments.
        owner: Whoever compiled it: sessions of another owner are none of its own.
        config: What ends a generation and what guidance branches share; decisions are by each region's own.
        weight: Position of the argument that tells module instances apart, or the tensor itself.
        conditioning: Position of the argument whose identity tells requests and guidance branches apart.
        has_clock: Whether the first region's probe ends with the timestep.
        policy_per_call: Whether the model's call tells the policy, and what it was given (`session.ModelCall`).
        copy_state: Copy what is kept: the inner compiler hands out buffers that it will write over (CUDA graphs).
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        owner: Hashable,
        config: CacheConfig,
        regions: Sequence[RegionPlan],
        *,
        weight: int | torch.Tensor,
        conditioning: int | None,
        has_clock: bool,
        policy_per_call: bool = False,
        copy_state: bool = False,
    ) -> None:
        self.forward = forward
        self.owner = owner
        self.config = config
        self.regions = tuple(regions)
        self._policies: dict[Changes | None, Policy] = {}
        self.weight = weight
        self.conditioning = conditioning
        self.has_clock = has_clock
        self.policy_per_call = policy_per_call
        self.copy_state = copy_state

    def __call__(self, *args: Any) -> Any:
        weight = args[self.weight] if isinstance(self.weight, int) else self.weight
        instance = instance_of(weight)
        conditioning = args[self.conditioning] if self.conditioning is not None else None
        call = current_call() if self.policy_per_call else None
        timestep = None
        if call is not None and not self.has_clock:  # This is a part of the forward: what it gets was made on the way.
            conditioning, timestep = call.conditioning, call.timestep
        policy = self.policy(call.policy if call is not None else None)
        session = instance.open(policy.owner, conditioning)
        watch = Stopwatch(self.regions[0].device)
        step = (ShadowedStep if policy.config.shadow else StepRun)(self, policy, instance, session, args)
        if timestep is not None:
            step.tick(timestep)
        output = self.forward(step, *args)
        lap = watch.stop()
        if isinstance(step, ShadowedStep):
            step.compare(self.forward, output)
        step.commit(lap)
        return output

    def policy(self, changes: Changes | None) -> Policy:
        """What decides at this call: the configuration that this was compiled with, but for `changes`."""
        if changes not in self._policies:
            config = self.config.override(changes)
            regions = tuple(config.override(plan.own) for plan in self.regions)
            self._policies[changes] = Policy(_number_of((self.owner, config)), config, regions)
        return self._policies[changes]


_owners: dict[Hashable, int] = {}


def _number_of(owner: Hashable) -> int:
    """A number for every distinct owner: cheap to compare at every call."""
    return _owners.setdefault(owner, len(_owners))
