"""One capture of a module for several configurations, because Dynamo's tracing takes most of the compilation time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import fx

from cachedit_fx import Backend


class Several(Backend):
    """Compiles every captured graph once with each of several backends; a call runs the chosen one.

    Args:
        backends: By the name that `choose` takes; the first one is chosen initially.
    """

    def __init__(self, backends: Mapping[Hashable, Backend]) -> None:
        super().__init__()
        self.backends = dict(backends)
        self._chosen = [next(iter(backends))]  # A list, so that copies of this backend share it.

    def choose(self, name: Hashable) -> None:
        assert name in self.backends, name
        self._chosen[0] = name

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        compiled = {name: backend(gm, example_inputs, **given) for name, backend in self.backends.items()}
        return lambda *args: compiled[self._chosen[0]](*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Several) and self._chosen is other._chosen

    def __hash__(self) -> int:
        return id(self._chosen)
