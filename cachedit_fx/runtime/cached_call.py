"""One call of a cached graph: look up the session, run the pieces, take what the step leaves behind."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, Changes
from cachedit_fx.forecasters.compile import CompiledForecaster
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.runtime.cached_values import Forecast
from cachedit_fx.runtime.instances import instance_of_weights
from cachedit_fx.runtime.scheduler_run import find_scheduler_run
from cachedit_fx.runtime.session import ModelCall, current_call
from cachedit_fx.runtime.shadow import ShadowedStep
from cachedit_fx.runtime.sources import Sources
from cachedit_fx.runtime.step import Policy, RegionPlan, StepRun
from cachedit_fx.runtime.stopwatch import Stopwatch

MAX_POLICIES = 64  # Configurations that are remembered: a server may set a mask or a decider for every request.


class CachedCall:
    """The function that Dynamo calls in place of its graph.

    Args:
        graph: The cached graph, its pieces compiled: takes a step and then the arguments of Dynamo's graph.
        owner: Whoever compiled it: sessions of another owner are none of its own.
        config: What ends a generation and what guidance branches share; decisions are by each region's own.
        weights: Of every block a weight, to tell module instances apart: its position among the arguments, or itself.
        conditioning: Position of the argument whose identity tells requests and guidance branches apart.
        has_timestep: Whether the first region's probe ends with the timestep, before
        num_checksums: that many sums of the conditioning's values.
        policy_per_call: Whether the model's call tells the policy, and what it was given (`session.ModelCall`).
        copy_state: Copy what is kept: the inner compiler hands out buffers that it will write over (CUDA graphs).
        inner: The inner compiler, for forecasters; by default their graphs run as they are.
        sources: How Dynamo calls the graph.
        region_paths: Modules that run inside the regions alone.
        number: Equal for graphs whose regions do the same: what one of them keeps is for the others, too.

    Attributes:
        asked: Positions of the arguments that are looked at before the graph runs.
        num_calls: Calls that it has begun to serve.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        owner: Hashable,
        config: CacheConfig,
        regions: Sequence[RegionPlan],
        *,
        weights: Sequence[int | torch.Tensor],
        conditioning: int | None,
        has_timestep: bool,
        num_checksums: int = 0,
        policy_per_call: bool = False,
        copy_state: bool = False,
        inner: Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., Any]] = lambda gm, _inputs: gm,
        sources: Sources | None = None,
        region_paths: Sequence[str] = (),
        number: int = 0,
    ) -> None:
        self.graph, self.forward = graph, graph.forward
        self.owner = owner
        self.config = config
        self.regions = tuple(regions)
        self._policies: dict[Changes | None, Policy] = {}
        self.number = number
        self.weights = tuple(weights)
        self.conditioning = conditioning
        self.has_timestep = has_timestep
        self.num_checksums = num_checksums
        self.policy_per_call = policy_per_call
        self.copy_state = copy_state
        self.inner = inner
        self._forecasts: dict[Forecaster, Forecast] = {}
        self.sources = sources or Sources(reason="how Dynamo calls the graph was not recorded")
        self.region_paths = tuple(region_paths)
        sizes = [i for plan in self.regions for i in plan.sizes.arguments]
        # A module that tells of its calls is known by itself.
        found = () if policy_per_call else tuple(weight for weight in self.weights if isinstance(weight, int))
        self.num_calls = 0
        self.asked = tuple(sorted({i for i in (*found, conditioning, *sizes) if i is not None}))

    def __call__(self, *args: Any) -> Any:
        run = self.begin(args)
        output = self.forward(run.step, *args)
        if isinstance(run.step, ShadowedStep):
            run.step.compare(self.forward, output)
        run.commit()
        call = current_call() if self.policy_per_call else None
        if call is not None:
            call.ran.append((self, args, output))
        return output

    def begin(self, args: Sequence[Any] | Mapping[int, Any]) -> Run:
        """The step that a call makes.

        Args:
            args: The graph's, or at least those `asked` for, by position.
        """
        self.num_calls += 1
        conditioning = args[self.conditioning] if self.conditioning is not None else None
        call = current_call() if self.policy_per_call else None
        if call is not None and call.instance is not None:
            instance = call.instance
        else:
            instance = instance_of_weights([args[w] if isinstance(w, int) else w for w in self.weights])
        instance.has_cached_graph = True
        timestep = None
        if call is not None and not self.has_timestep:
            # This is a part of the forward: what it gets was made on the way.
            conditioning, timestep = call.conditioning, call.timestep
        policy = self.policy(call.policy if call is not None else None)
        scheduler_run = find_scheduler_run()
        opened = instance.open(policy.owner, conditioning, scheduler_run)
        stopwatch = Stopwatch(self.regions[0].device)
        step = (ShadowedStep if policy.config.shadow else StepRun)(self, policy, instance, opened, scheduler_run, args)
        if timestep is not None:
            step.tick(timestep)
        return Run(step, stopwatch, call)

    def forecast(self, forecaster: Forecaster | None) -> Forecast | None:
        """The forecaster with its functions, which are compiled when they are first needed."""
        if forecaster is None:
            return None
        if forecaster not in self._forecasts:
            self._forecasts[forecaster] = Forecast(forecaster, CompiledForecaster(forecaster, self.inner))
        return self._forecasts[forecaster]

    def policy(self, changes: Changes | None) -> Policy:
        """What decides at this call: the configuration that this was compiled with, but for `changes`."""
        if changes not in self._policies:
            while len(self._policies) >= MAX_POLICIES:
                del self._policies[next(iter(self._policies))]
            config = self.config.override(changes)
            regions = tuple(config.override(plan.overrides) for plan in self.regions)
            asks = any(region.decider is not None for region in regions)
            self._policies[changes] = Policy(_number_of((self.owner, config)), config, regions, asks)
        return self._policies[changes]


@dataclass(slots=True)
class Run:
    """A step that is being made, and how long it has taken."""

    step: StepRun
    stopwatch: Stopwatch
    call: ModelCall | None = None

    def commit(self) -> None:
        """The step is over: it becomes part of its session."""
        self.step.commit(self.stopwatch.stop())
        if self.call is not None:
            self.call.num_served += 1
            self.call.has_reused |= self.step.has_reused

    def give_up(self) -> None:
        """The call is made in another way: nothing of this step is left behind."""
        self.step.give_up()


_numbers = itertools.count()


@functools.lru_cache(maxsize=MAX_POLICIES)
def _number_of(_owner: Hashable) -> int:
    """A number for every distinct owner: cheap to compare at every call. One that was forgotten gets another number."""
    return next(_numbers)
