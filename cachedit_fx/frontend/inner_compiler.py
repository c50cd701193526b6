"""Hands pieces to the inner compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.passes.extract import generate_code
from cachedit_fx.passes.transforms.split_pieces import Piece

# Backends that run the graph's own operations: nothing is compiled, and what they return is compared bit by bit.
_RUNS_AS_IS = ("eager", "eager_noexcept", "eager_debug")


def runs_as_is(inner_backend: str) -> bool:
    """Whether pieces run as they are under this backend, so that nothing may be done that changes rounding."""
    return inner_backend in _RUNS_AS_IS


class InnerCompiler:
    """The backend that compiles the pieces, with `mode=` and the options that are not ours."""

    def __init__(self, config: CacheConfig, mode: str | None, options: Mapping[str, Any]) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        self.name = config.inner_backend
        mode = mode or config.mode
        self._compile: Callable[..., Any]
        if self.name == "inductor":
            wrapper = torch._TorchCompileInductorWrapper(mode, dict(options), None)  # type: ignore[no-untyped-call]
            self._compile = wrapper
            self.owns_buffers = bool(wrapper.config.get("triton.cudagraphs", False))
        else:
            kwargs = {"mode": mode} if mode and mode != "default" else {}
            backend = lookup_backend(self.name)
            self._compile = lambda gm, inputs: backend(gm, inputs, **kwargs)
            self.owns_buffers = self.name == "cudagraphs"

    @property
    def is_exact(self) -> bool:
        """Whether the pieces run as they are, so that nothing may be done that changes rounding."""
        return runs_as_is(self.name)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = self._compile(gm, example_inputs)
        return compiled

    def compile_piece(self, piece: Piece) -> None:
        """Compiles the piece and puts the result wherever it is called."""
        generate_code(piece.gm)  # A backend may hand out its `forward`.
        compiled = self(piece.gm, piece.example_inputs)
        for segment, name in piece.calls:
            segment.delete_submodule(name)
            # A plain attribute, not a module: found without nn.Module's look-up, once per piece and call.
            segment.__dict__[name] = compiled
