"""The cases that are checked: a model, a dtype, and how it is compiled. Each runs in a process of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.gpu.works import CHECK_WORKS
from benchmarks.work import Work

DEFAULT, REDUCE_OVERHEAD, NO_GRAPHS = None, "reduce-overhead", "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: A unique name.
        work: A key of `CHECK_WORKS`.
        dtype: The dtype of the weights.
        mode: The mode of Inductor.
        is_tiny: Whether the model has the smallest sizes instead of blocks of a published model.
        is_compiled: Whether Inductor compiles; otherwise the inner backend is "eager", and equality is bitwise.
        has_global_graphs: Whether `torch._inductor.config.triton.cudagraphs` is True, which no mode sets.
        is_quantized: Whether torchao quantizes the linear layers of the blocks to float8.
        seconds: The expected duration on a GPU.
    """

    name: str
    work: str
    dtype: str
    mode: str | None = DEFAULT
    is_tiny: bool = False
    is_compiled: bool = True
    has_global_graphs: bool = False
    is_quantized: bool = False
    seconds: float = 60

    @property
    def uses_graphs(self) -> bool:
        """Whether Inductor records CUDA graphs, on a GPU."""
        return self.is_compiled and (self.mode == REDUCE_OVERHEAD or self.has_global_graphs)

    def find_work(self) -> Work:
        work = dataclasses.replace(CHECK_WORKS[self.work], dtype=self.dtype)
        return work.tiny() if self.is_tiny else work

    def describe(self) -> str:
        size = "tiny" if self.is_tiny else "real blocks"
        compiled = f"Inductor, mode {self.mode or 'default'}" if self.is_compiled else "eager inner backend"
        extra = ", cudagraphs=True globally" if self.has_global_graphs else ""
        dtype = f"{self.dtype}, float8 linear layers" if self.is_quantized else self.dtype
        return f"{self.work}, {size}, {dtype}, {compiled}{extra}"


_EAGER = dict(is_compiled=False)
_TINY = dict(is_tiny=True)
_ALL = (
    Case("eager-flux-tiny", "flux", "float32", seconds=20, **_TINY, **_EAGER),
    Case("eager-flux", "flux", "bfloat16", seconds=25, **_EAGER),
    Case("default-flux", "flux", "bfloat16", seconds=60),
    Case("graphs-flux", "flux", "bfloat16", REDUCE_OVERHEAD, seconds=60),
    Case("global-graphs-flux", "flux", "bfloat16", has_global_graphs=True, seconds=60),
    Case("default-flux-tiny", "flux", "float32", seconds=45, **_TINY),
    Case("graphs-flux-tiny", "flux", "float32", REDUCE_OVERHEAD, seconds=45, **_TINY),
    Case("graphs-wan", "wan", "bfloat16", REDUCE_OVERHEAD, seconds=60),
    Case("default-qwen", "qwen", "bfloat16", seconds=60),
    Case("eager-wan-tiny", "wan", "float32", seconds=20, **_TINY, **_EAGER),
    Case("eager-qwen-tiny", "qwen", "bfloat16", seconds=20, **_TINY, **_EAGER),
    Case("graphs-qwen-tiny", "qwen", "float32", REDUCE_OVERHEAD, seconds=45, **_TINY),
    Case("autotuned-flux-tiny", "flux", "float32", NO_GRAPHS, seconds=90, **_TINY),
    Case("autotuned-flux", "flux", "bfloat16", NO_GRAPHS, seconds=110),
    Case("float8-flux", "flux", "bfloat16", is_quantized=True, seconds=70),
    Case("float8-graphs-flux", "flux", "bfloat16", REDUCE_OVERHEAD, is_quantized=True, seconds=70),
)
CASES = {case.name: case for case in _ALL}
