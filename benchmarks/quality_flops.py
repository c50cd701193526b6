"""FLOPs of the pieces that cachedit_fx runs, counted while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, fx

from cachedit_fx.flops import FlopCounter
from cachedit_fx.frontend.inner_compiler import InnerCompiler


class PieceFlops:
    """A counter for pieces. `FlopCounter` alone cannot count them: Dynamo compiles nothing within a dispatch mode."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> PieceFlops:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, whose FLOPs are counted at its first call with inputs of these shapes, and added at every call."""
        known: dict[tuple[Any, ...], int] = {}

        def piece(*args: Any) -> Any:
            shapes = tuple(arg.shape if isinstance(arg, Tensor) else None for arg in args)
            if shapes not in known:
                with FlopCounter() as counter:
                    out = run(*args)
                known[shapes] = counter.total
            else:
                out = run(*args)
            self.total += known[shapes]
            return out

        return piece

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, pieces that are handed to an inner compiler are counted for good."""
        call = InnerCompiler.__call__

        def compiled(compiler: InnerCompiler, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            return self.counted(call(compiler, gm, example_inputs))

        with mock.patch.object(InnerCompiler, "__call__", compiled):
            yield
