"""Counts the FLOPs of the pieces that cachedit_fx runs, while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, fx

from cachedit_fx.flops import FlopCounter
from cachedit_fx.frontend.inner_compiler import InnerCompiler


class PieceFlops:
    """Counts the FLOPs of pieces. `FlopCounter` alone cannot: Dynamo compiles nothing below a dispatch mode."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> PieceFlops:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `run` with a counter. FLOPs are counted once for given input shapes, and added at every call."""
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
        """Makes the pieces that are passed to an inner compiler inside this context count their FLOPs permanently."""
        call = InnerCompiler.__call__

        def compiled(compiler: InnerCompiler, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            return self.counted(call(compiler, gm, example_inputs))

        with mock.patch.object(InnerCompiler, "__call__", compiled):
            yield
