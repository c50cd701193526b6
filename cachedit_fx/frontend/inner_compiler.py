"""The inner compiler: compiles pieces with the inner backend."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.frontend.torch_internals import compile_lock, compiling, inductor, mark_static_inputs, named_backend
from cachedit_fx.passes.extract import generate_code
from cachedit_fx.passes.piece import Piece
from cachedit_fx.passes.transforms.exchange import exchange
from cachedit_fx.patterns.nodes import value_of

# Backends that compile nothing. They run the operations of the graph, and their outputs are compared bit by bit.
_RUNS_AS_IS = ("eager", "eager_noexcept", "eager_debug")


def runs_as_is(inner_backend: str) -> bool:
    """Whether this backend runs pieces as they are, so that no rewrite may change rounding."""
    return inner_backend in _RUNS_AS_IS


class InnerCompiler:
    """The inner backend, with `mode=` and the options that are not fields of `CacheConfig`.

    Attributes:
        owns_buffers: Whether it returns buffers that the next call overwrites (CUDA graphs).
    """

    def __init__(self, config: CacheConfig, mode: str | None, options: Mapping[str, Any]) -> None:
        self.name = config.inner_backend
        mode = mode or config.mode
        self._compile: Callable[..., Any]
        if self.name == "inductor":
            self._compile, self.owns_buffers = inductor(mode, options)
        else:
            self._compile, self.owns_buffers = named_backend(self.name, mode), self.name == "cudagraphs"

    @property
    def is_exact(self) -> bool:
        """Whether the pieces run as they are, so that no rewrite may change rounding."""
        return runs_as_is(self.name)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # A forecaster is compiled at a call, while another thread may be in Dynamo.
        with compile_lock, compiling(example_inputs):
            compiled: Callable[..., Any] = self._compile(gm, example_inputs)
        return compiled

    def compile_piece(self, piece: Piece) -> None:
        """Compiles a piece, and puts the result in the place of its calls."""
        generate_code(piece.gm)  # A backend may return its `forward`.
        _complete_examples(piece.gm)
        inputs = piece.example_inputs
        # Only CUDA graphs need to know. Inductor takes it that static inputs are aligned like the first ones, which is
        # not known of blocks that share a piece. AOTAutograd merges inputs that are one tensor, and then needs a source
        # for each of them.
        if self.owns_buffers and len({id(value) for value in inputs}) == len(inputs):
            mark_static_inputs(piece.gm)
        compiled = self(piece.gm, inputs)
        for segment, name in piece.calls:
            segment.delete_submodule(name)
            # A plain attribute is found faster than a module, at every call of every piece.
            segment.__dict__[name] = compiled


def _complete_examples(gm: fx.GraphModule) -> None:
    """Adds the example values of the operations that a pass has added.

    AOTAutograd caches a graph on disk only if it knows that methods are called on tensors, for which it looks here.
    """
    for node in gm.graph.nodes:
        is_call = node.op in ("call_function", "call_method")
        if not is_call or not node.users or "example_value" in node.meta:  # `x[...] = y` has no users.
            continue
        values = [value_of(arg) for arg in node.all_input_nodes]
        modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
        if not modes or None in values or node.target is exchange:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        call = operator.methodcaller(node.target, *args[1:], **kwargs) if node.op == "call_method" else node.target
        with modes[0], torch.no_grad():
            node.meta["example_value"] = call(args[0]) if node.op == "call_method" else call(*args, **kwargs)
