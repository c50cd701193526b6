"""One call of a cached graph: looks up the session, runs the pieces, and commits the step."""

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
from cachedit_fx.forecasters.forecaster import Forecaster, LinearForecaster
from cachedit_fx.passes.analysis.runtime_plan import RuntimePlan
from cachedit_fx.runtime.cached_values import Forecast
from cachedit_fx.runtime.instances import instance_of_weights
from cachedit_fx.runtime.model_call import ModelCall, current_call
from cachedit_fx.runtime.region_run import Policy
from cachedit_fx.runtime.scheduler_run import find_scheduler_run
from cachedit_fx.runtime.shadow import ShadowedStep
from cachedit_fx.runtime.sources import Sources
from cachedit_fx.runtime.step import StepRun
from cachedit_fx.runtime.stopwatch import Stopwatch

MAX_POLICIES = 64  # Configurations that are kept. A server may set a mask or a decider for every request.


class CachedCall:
    """The function that Dynamo calls in place of its graph.

    Args:
        graph: The cached graph with compiled pieces. Its arguments are a step and the arguments of Dynamo's graph.
        owner: Who compiled it. It uses no sessions of another owner.
        config: What ends a generation, and what guidance branches share. Each region decides by its own overrides.
        plan: What the passes decided for the runtime.
        policy_per_call: Whether the call of the model provides the policy and its arguments (`model_call.ModelCall`).
        copy_state: Copy what is cached, since the inner compiler overwrites the buffers that it returns (CUDA graphs).
        inner: The inner compiler, for forecasters. By default, their graphs run as they are.
        sources: How Dynamo calls the graph.

    Attributes:
        begin_arguments: The positions of the arguments that `begin` reads.
        num_calls: The number of calls that it has begun to serve.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        owner: Hashable,
        config: CacheConfig,
        plan: RuntimePlan,
        *,
        policy_per_call: bool = False,
        copy_state: bool = False,
        inner: Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., Any]] = lambda gm, _inputs: gm,
        sources: Sources | None = None,
    ) -> None:
        self.graph, self.forward = graph, graph.forward
        self.owner = owner
        self.config = config
        self.regions, self.region_paths, self.region_key = plan.regions, plan.region_paths, plan.region_key
        self.weights, self.conditioning = plan.weights, plan.conditioning
        self.has_timestep, self.num_checksums = plan.has_timestep, plan.num_checksums
        self._policies: dict[Changes | None, Policy] = {}
        self.policy_per_call = policy_per_call
        self.copy_state = copy_state
        self.inner = inner
        self._forecasts: dict[Forecaster, Forecast] = {}
        self._sum = CompiledForecaster(LinearForecaster(), inner)
        self.sources = sources or Sources(reason="it was not recorded how Dynamo calls the graph")
        sizes = [i for region in self.regions for i in region.sizes.arguments]
        # If the calls of a module provide their policy, they provide the module too.
        found = () if policy_per_call else tuple(weight for weight in self.weights if isinstance(weight, int))
        self.num_calls = 0
        self.begin_arguments = tuple(sorted({i for i in (*found, self.conditioning, *sizes) if i is not None}))

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
        """Starts the step that a call makes.

        Args:
            args: The arguments of the graph by position; at least those at `begin_arguments`.
        """
        self.num_calls += 1
        conditioning = args[self.conditioning] if self.conditioning is not None else None
        call = current_call() if self.policy_per_call else None
        if call is not None and call.instance is not None:
            instance = call.instance
        else:
            instance = instance_of_weights([args[w] if isinstance(w, int) else w for w in self.weights])
        instance.has_cached_graph = instance.keeps_sessions
        instance.shares_decisions |= bool(self.regions[0].groups)
        timestep = None
        if call is not None and not self.has_timestep:
            # The graph is a part of the forward, and does not receive the arguments of the model.
            conditioning, timestep = call.conditioning, call.unread_timestep
        policy = self.policy(call.policy if call is not None else None)
        scheduler_run = find_scheduler_run()
        opened = instance.open(policy.owner, conditioning, scheduler_run)
        stopwatch = Stopwatch(self.regions[0].devices[-1])
        step = (ShadowedStep if policy.config.shadow else StepRun)(self, policy, instance, opened, scheduler_run, args)
        if timestep is not None:
            step.set_timestep(timestep)
        return Run(step, stopwatch, call)

    def forecast(self, forecaster: Forecaster | None) -> Forecast | None:
        """The forecaster with its functions, which are compiled at their first call."""
        if forecaster is None:
            return None
        if forecaster not in self._forecasts:
            self._forecasts[forecaster] = Forecast(forecaster, CompiledForecaster(forecaster, self.inner))
        return self._forecasts[forecaster]

    def weighted_sum(self, tensors: tuple[torch.Tensor, ...], factors: tuple[float, ...]) -> torch.Tensor:
        """The sum of residuals, each multiplied by its factor, in one compiled kernel."""
        return self._sum.predict(tensors, factors)

    def policy(self, changes: Changes | None) -> Policy:
        """The policy of a call: the configuration of the graph with `changes`."""
        if changes not in self._policies:
            while len(self._policies) >= MAX_POLICIES:
                del self._policies[next(iter(self._policies))]
            config = self.config.override(changes)
            regions = tuple(config.override(plan.overrides) for plan in self.regions)
            has_decider = any(region.decider is not None for region in regions)
            self._policies[changes] = Policy(_number_of((self.owner, config)), config, regions, has_decider)
        return self._policies[changes]


@dataclass(slots=True)
class Run:
    """A running step, and its stopwatch."""

    step: StepRun
    stopwatch: Stopwatch
    call: ModelCall | None = None

    def commit(self) -> None:
        """Makes the finished step part of its session."""
        self.step.commit(self.stopwatch.stop())
        if self.call is not None:
            self.call.num_served += 1
            self.call.has_reused |= self.step.has_reused

    def discard(self) -> None:
        """Undoes the step, because the call will be made again."""
        self.step.discard()


_numbers = itertools.count()


@functools.lru_cache(maxsize=MAX_POLICIES)
def _number_of(_owner: Hashable) -> int:
    """A number for every distinct owner, which is cheap to compare. An evicted owner gets another number later."""
    return next(_numbers)
