"""The shapes that cached values must have at a call: constants, or functions of the sizes that the graph is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from cachedit_fx.patterns.nodes import size_key, value_of

Size = tuple[tuple[int, ...], tuple[int, ...]]  # shape, strides
Sizes = tuple[Size, ...]


class UnknownSizeError(ValueError):
    """A size depends on data, so that the shape of a tensor is not known before a call.

    Attributes:
        symbols: The symbols of such sizes, for example "u0".
    """

    def __init__(self, symbols: str) -> None:
        super().__init__(f"a size ({symbols}) depends on data")
        self.symbols = symbols


class SizeRule:
    """Shapes and strides of some tensors, as a function of the arguments of a graph.

    Args:
        tensors: Fake tensors whose sizes are ints or expressions over the symbols of the placeholders.
        placeholders: The placeholders of the graph, in the order of the arguments of a call.

    Attributes:
        arguments: Positions of the placeholders that the sizes depend on.

    Raises:
        UnknownSizeError: An expression contains a symbol that is no placeholder.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], placeholders: Sequence[fx.Node]) -> None:
        sizes = [(tuple(map(size_key, t.shape)), tuple(map(size_key, t.stride()))) for t in tensors]
        symbols = {s for pair in sizes for part in pair for e in part if not isinstance(e, int) for s in _free(e)}
        held = {
            value_of(node).node.expr: i
            for i, node in enumerate(placeholders)
            if isinstance(value_of(node), torch.SymInt)
        }
        if symbols - set(held):
            raise UnknownSizeError(", ".join(sorted(map(str, symbols - set(held)))))
        ordered = sorted(symbols, key=str)
        self.arguments = [held[symbol] for symbol in ordered]
        self._text = (
            f"lambda {', '.join(map(str, ordered))}: {_tuple(_tuple(_tuple(map(_print, p)) for p in s) for s in sizes)}"
        )
        self._has_symbols = bool(symbols)
        self._prepare()

    def _prepare(self) -> None:
        self._compute: Callable[..., Sizes] = eval(self._text, {"math": math, "torch": torch})
        self._fixed: Sizes | None = None if self._has_symbols else self._compute()

    def __getstate__(self) -> tuple[list[int], str, bool]:
        return self.arguments, self._text, self._has_symbols

    def __setstate__(self, state: tuple[list[int], str, bool]) -> None:
        self.arguments, self._text, self._has_symbols = state
        self._prepare()

    def __call__(self, arguments: Sequence[Any] | Mapping[int, Any]) -> Sizes:
        """The shapes and strides at a call.

        Args:
            arguments: The arguments of the graph, by position; sizes among them are ints.
        """
        if self._fixed is not None:
            return self._fixed
        return self._compute(*(arguments[i] for i in self.arguments))


def _free(expression: Any) -> set[sympy.Symbol]:
    return set(expression.free_symbols)


def _print(size: Any) -> str:
    return str(size) if isinstance(size, int) else PythonPrinter().doprint(size)


def _tuple(parts: Any) -> str:
    return "(" + "".join(f"{part}, " for part in parts) + ")"
