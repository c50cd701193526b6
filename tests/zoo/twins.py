"""A captured graph compiled once more with another cut, to run it in the place of the first: Dynamo captures once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

from cachedit_fx import Backend, CacheConfig
from cachedit_fx.light import MISSED, LightCalls
from cachedit_fx.runtime import GuardedCall


class Twins:
    """The guarded graphs of a module, each with a second one that was made of the same capture.

    Args:
        config: What the second one is built by.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._backend = Backend(config, policy_per_call=True)
        self._twins: dict[GuardedCall, GuardedCall] = {}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compiles the second one of every graph that is captured inside and matches."""
        compile_graph = Backend.__call__

        def compile_both(backend: Backend, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            compiled = compile_graph(backend, gm, example_inputs, **kwargs)
            if isinstance(compiled, GuardedCall):
                self._twins[compiled] = compile_graph(self._backend, gm, example_inputs, **kwargs)
            return compiled

        with mock.patch.object(Backend, "__call__", compile_both):
            yield

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Runs the second graphs, with the inputs that Dynamo finds for the first."""
        call, twins = GuardedCall.__call__, self._twins

        def call_twin(first: GuardedCall, *args: Any) -> Any:
            return call(twins[first], *args)

        by_dynamo = mock.patch.object(LightCalls, "__call__", lambda *_: MISSED)
        with mock.patch.object(GuardedCall, "__call__", call_twin), by_dynamo:
            yield
