"""FLOPs that are really executed: matrix products, attention and convolutions of what runs, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cachedit_fx.frontend.inner_compiler import InnerCompiler


class Flops(TorchDispatchMode):
    """Counts the FLOPs of eager operations; as torch's `FlopCounterMode`, without its count per module: 3x as fast."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class PieceFlops:
    """Counts the FLOPs of the pieces that cachedit_fx runs. A mode cannot: Dynamo compiles nothing below one."""

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
                with Flops() as counter:
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
