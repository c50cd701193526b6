"""The call of a whole model, for the graphs that begin after its first lines."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from cachedit_fx.config.cache_config import Changes
from cachedit_fx.runtime.host_read import HostRead, Timestep, Unread, known
from cachedit_fx.runtime.instance import Instance

_call: ContextVar[ModelCall | None] = ContextVar("cachedit_fx_call", default=None)


class ModelCall:
    """A call of a whole model. Graphs that begin after the first lines of the model read its arguments here.

    Attributes:
        conditioning: The tensor whose identity distinguishes requests and guidance branches.
        policy: When to reuse; None for the policy that the graphs were compiled with.
        ran: The cached graphs that Dynamo ran during this call, each with its arguments and outputs.
        uncached_graphs: The graphs that ran without the cache during this call (`UncachedGraph`), once per run.
        num_served: The number of cached graphs that ran during this call, with or without Dynamo.
        has_reused: Whether one of them reused cached values.
        instance: The sessions of the model; None if they are found by its weights.
        placement: Where the weights of the model are while its graph runs without the hooks that move them.
        is_offloaded: Whether the graph ran without these hooks.
    """

    __slots__ = (
        "_timestep",
        "conditioning",
        "has_reused",
        "instance",
        "is_offloaded",
        "num_served",
        "placement",
        "policy",
        "ran",
        "uncached_graphs",
    )

    def __init__(
        self,
        timestep: object,
        conditioning: torch.Tensor | None,
        policy: Changes | None = None,
        instance: Instance | None = None,
    ) -> None:
        self._timestep = timestep
        self.instance = instance
        self.conditioning = conditioning
        self.policy = policy
        self.ran: list[tuple[Any, tuple[Any, ...], Any]] = []
        self.uncached_graphs: list[Any] = []
        self.num_served, self.has_reused = 0, False
        self.placement: Any = None  # A `Placement`, whose module imports this one.
        self.is_offloaded = False

    @property
    def timestep(self) -> float | None:
        """The largest of the timesteps; None if the call has none. Reads from the device."""
        return known(self.unread_timestep)

    @property
    def unread_timestep(self) -> Timestep:
        """The same, without waiting for the device."""
        given = self._timestep
        if isinstance(given, torch.Tensor):
            return Unread(HostRead(given.max().reshape(1)), 0) if given.numel() else None
        if isinstance(given, np.ndarray):
            return float(given.max()) if given.size else None
        return float(given) if isinstance(given, numbers.Real) else None


def current_call() -> ModelCall | None:
    """The call of the model that this thread and async task is in (see `within_call`); None if it is unknown."""
    return _call.get()


@contextlib.contextmanager
def within_call(call: ModelCall) -> Iterator[None]:
    """Makes `call` known to the graphs that run in the block."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
