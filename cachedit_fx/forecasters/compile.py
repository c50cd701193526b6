"""Forecasters under the inner compiler: `CompiledForecaster`."""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cachedit_fx.errors import ConfigError, cut, shown
from cachedit_fx.forecasters.forecaster import Forecaster

Compile = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]
Tensors = tuple[Tensor, ...]

_CURE = (
    "What to do: `predict` and `update` take torch operations alone; no `if`, float() or .item() on a tensor "
    "(docs/forecasters.md)."
)


class CompiledForecaster:
    """A forecaster whose `predict` and `update` are compiled at their first call, per number of tensors and their
    shapes, strides, dtypes and devices. No guard of Dynamo is asked at a call. May be shared by threads.

    Nothing is kept of the tensors that it is called with.

    Args:
        forecaster: What is compiled.
        compile: The inner compiler; given a graph and fake tensors like those that it will be called with.
    """

    def __init__(self, forecaster: Forecaster, compile: Compile) -> None:
        self.forecaster = forecaster
        self._compile = compile
        self._pieces: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._takes_in = type(forecaster).update is not Forecaster.update

    def predict(self, history: Tensors, numbers: Sequence[float]) -> Tensor:
        """The value at a reused step: a tensor of its own, or `history[0]` itself where nothing is forecast.

        Args:
            numbers: What the forecaster's `numbers` returned.

        Raises:
            ConfigError: The forecaster cannot be traced or compiled, or returned what it must not.
        """
        if not self.forecaster.forecasts_from(len(history)):
            return history[0]
        found: Tensor = self._run("predict", history, numbers)[0]
        return found

    def update(self, history: Tensors, value: Tensor, numbers: Sequence[float]) -> Tensors:
        """The history that takes in a computed value; `value` and tensors of `history` may be in it as they are.

        Args:
            numbers: `Times.ages` of the computed steps in the history.

        Raises:
            ConfigError: The forecaster cannot be traced or compiled, or returned what it must not.
        """
        if not self._takes_in:
            return (value, *history)[: self.forecaster.depth]
        return tuple(self._run("update", (*history, value), numbers))

    def _run(self, name: str, tensors: Tensors, numbers: Sequence[float]) -> Sequence[Tensor]:
        key = (name, len(numbers), *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        inputs = [*tensors, _on_device(numbers, tensors[0].device)]
        with torch.no_grad():
            if key not in self._pieces:
                with self._lock:
                    if key not in self._pieces:
                        self._pieces[key] = self._compiled(name, inputs)
            found: Sequence[Tensor] = self._pieces[key](*inputs)
        return found

    def _compiled(self, name: str, inputs: list[Tensor]) -> Callable[..., Any]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # Constants, as the 0 of `torch.where(..., 0)`.
        with torch.inference_mode(False), torch.no_grad():
            fakes: list[Tensor] = [mode.from_tensor(_like(x)) for x in inputs]
            try:
                graph = make_fx(_pure(self.forecaster, name))(*fakes)
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"cachedit_fx: `{name}` of forecaster {type(self.forecaster).__name__} cannot be traced"
                    f"{_place(self.forecaster, error)}: {type(error).__name__}: {cut(error)}\n{_CURE}"
                ) from error
            try:
                return self._compile(graph, fakes)
            except Exception as error:
                raise ConfigError(
                    f"cachedit_fx: the inner backend does not compile `{name}` of forecaster "
                    f"{type(self.forecaster).__name__}: {type(error).__name__}: {cut(error)}\nWhat to do: put that "
                    "operation in other words, or set inner_backend='eager' to run it as it is."
                ) from error


def _pure(forecaster: Forecaster, name: str) -> Callable[..., Tensors]:
    """`predict` or `update` as a function of tensors alone, which checks what they return."""

    def predict(*inputs: Tensor) -> Tensors:
        *history, numbers = inputs
        value = forecaster.predict(tuple(history), numbers)
        if not _is_like(value, history[0]):
            raise ConfigError(
                f"cachedit_fx: `predict` of forecaster {type(forecaster).__name__} returned what is not like the "
                f"history.\n  expected: {_described(history[0])}\n  found:    {_described(value)}"
            )
        storages = {x.untyped_storage()._cdata for x in inputs}
        return (value.clone() if value.untyped_storage()._cdata in storages else value,)

    def update(*inputs: Tensor) -> Tensors:
        *history, value, numbers = inputs
        found = forecaster.update(tuple(history), value, numbers)
        allowed = isinstance(found, tuple) and 1 <= len(found) <= forecaster.depth
        if not allowed or not all(_is_like(tensor, value) for tensor in found):
            got = f"({', '.join(map(_described, found[:3]))})" if isinstance(found, tuple) else _described(found)
            raise ConfigError(
                f"cachedit_fx: `update` of forecaster {type(forecaster).__name__} returned what is no history.\n"
                f"  expected: a tuple of 1 to {forecaster.depth} (`depth`), each {_described(value)}\n"
                f"  found:    {got}"
            )
        return found

    return predict if name == "predict" else update


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The numbers as float32. From pinned memory, so that the host does not wait for the device."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return torch.tensor(numbers, dtype=torch.float32, pin_memory=True).to(device, non_blocking=True)


def _like(tensor: Tensor) -> Tensor:
    """A tensor of this shape, stride, dtype and device that is no inference tensor: those cannot be traced."""
    if not tensor.is_inference():
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _is_like(found: object, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)


def _described(found: object) -> str:
    if not isinstance(found, Tensor):
        return shown(found)
    return f"a {str(found.dtype).removeprefix('torch.')} tensor of shape {tuple(found.shape)}"


def _place(forecaster: Forecaster, error: Exception) -> str:
    """` (at mine.py:12)`: where in the forecaster's own file it stopped; empty where it did not stop there."""
    file = inspect.getsourcefile(type(forecaster)) if type(forecaster).__module__ != "__main__" else None
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (at {str(file).rsplit('/', 1)[-1]}:{lines[-1]})" if lines else ""
