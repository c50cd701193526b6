"""Compiles captured graphs again with other cuts, and runs these instead of the first: Dynamo captures only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

from cachedit_fx import Backend, CacheConfig
from cachedit_fx.frontend.fast_dispatch import NOT_SERVED, FastDispatcher
from cachedit_fx.runtime.cached_call import CachedCall
from tests.zoo.variant import Cut


class Twins:
    """The cached graphs of a module, each with others that were compiled from the same capture.

    Args:
        configs: The configurations of the others.
    """

    def __init__(self, configs: Mapping[Cut, CacheConfig]) -> None:
        self._backends = {cut: Backend(config, policy_per_call=True) for cut, config in configs.items()}
        self._twins: dict[tuple[CachedCall, Cut], CachedCall] = {}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compiles the others for every matching graph that is captured inside the context."""
        compile_graph = Backend.__call__

        def compile_all(backend: Backend, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            compiled = compile_graph(backend, gm, example_inputs, **kwargs)
            if isinstance(compiled, CachedCall):
                for cut, other in self._backends.items():
                    self._twins[compiled, cut] = compile_graph(other, gm, example_inputs, **kwargs)
            return compiled

        with mock.patch.object(Backend, "__call__", compile_all):
            yield

    @contextmanager
    def instead(self, cut: Cut) -> Iterator[None]:
        """Runs the graphs with the given cut, with the inputs that Dynamo passes to the first one."""
        call, twins = CachedCall.__call__, self._twins

        def call_twin(first: CachedCall, *args: Any) -> Any:
            return call(twins[first, cut], *args)

        by_dynamo = mock.patch.object(FastDispatcher, "__call__", lambda *_: NOT_SERVED)
        with mock.patch.object(CachedCall, "__call__", call_twin), by_dynamo:
            yield
