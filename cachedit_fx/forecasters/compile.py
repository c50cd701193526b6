"""Compiles forecasters with the inner compiler: `CompiledForecaster`."""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from cachedit_fx.errors import ConfigError, cut, shown
from cachedit_fx.forecasters.forecaster import Forecaster, Times
from cachedit_fx.forecasters.trace_function import trace
from cachedit_fx.forecasters.verdict import choose, judge, terms
from cachedit_fx.forking import released_in_child

Compile = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]
Tensors = tuple[Tensor, ...]

_CURE = (
    "What to do: use only torch operations in `predict` and `update`; no `if`, float() or .item() on a tensor "
    "(docs/forecasters.md)."
)


class CompiledForecaster:
    """A forecaster whose `predict` and `update` are compiled at their first call.

    They are compiled once per number of tensors and their shapes, strides, dtypes and devices. A call checks no guard
    of Dynamo. Several threads may share one object. It holds no reference to the tensors that it is called with.

    Args:
        forecaster: The forecaster to compile.
        compile: The inner compiler. It is called with a graph and with fake tensors that are like its later inputs.
    """

    def __init__(self, forecaster: Forecaster, compile: Compile) -> None:
        self.forecaster = forecaster
        self._compile = compile
        self._pieces: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = released_in_child(threading.Lock())  # Held during compilation, so that no piece is compiled twice.
        self._has_update = type(forecaster).update is not Forecaster.update

    def predict(self, history: Tensors, numbers: Sequence[float], verdict: Tensor | None = None) -> Tensor:
        """Returns the value at a reused step: a new tensor, or `history[0]` itself if nothing is forecast.

        Args:
            history: Values of the computed steps, newest first, all of one shape and dtype.
            numbers: What the forecaster's `numbers` returned.
            verdict: Whether the forecast is used, for each sample (see `judge`), bool [B]; None uses it for all.

        Raises:
            ConfigError: The forecaster cannot be traced or compiled, or its result has a wrong type, shape or dtype.
        """
        if not self.forecaster.forecasts_from(len(history)):
            return history[0]
        if verdict is None:
            return self._run("predict", history, numbers)[0]
        return self._run("choose", (*history, verdict), numbers)[0]

    def summary(self, history: Tensors) -> Tensor | None:
        """Returns what the host has to read of a history to forecast from it, one-dimensional; None if nothing."""
        if type(self.forecaster)._summary is Forecaster._summary:
            return None
        return next(iter(self._run("summary", history, ())), None)

    def judge(
        self,
        history: Tensors,
        value: Tensor,
        verdict: Tensor,
        times: Times,
        numbers: Sequence[float],
        *,
        is_static: bool,
    ) -> Tensor:
        """Returns whether forecasts are used after a computed step, bool [B] (see `verdict.judge`).

        Args:
            history: Values of the previous computed steps, newest first, all of one shape and dtype.
            value: The value of this step, with the shape and dtype of the history.
            verdict: The previous verdict, bool [B]; it is returned unchanged if nothing is forecast.
            times: The times of this step.
            numbers: The numbers that `predict` receives for this step.
            is_static: Whether the computed steps were chosen beforehand.

        Raises:
            ConfigError: The forecaster cannot be traced or compiled, or its result has a wrong type, shape or dtype.
        """
        if not self.forecaster.forecasts_from(len(history)):
            return verdict
        numbers = (*numbers, *terms(times, is_static=is_static))
        return self._run("judge", (*history, value, verdict), numbers)[0]

    def update(self, history: Tensors, value: Tensor, numbers: Sequence[float]) -> Tensors:
        """Returns the history with a computed value added. It may contain `value` and tensors of `history` themselves.

        Args:
            history: The previous history, newest first, all of one shape and dtype.
            value: The value of this step, with the shape and dtype of the history.
            numbers: `Times.ages` of the computed steps in the history.

        Raises:
            ConfigError: The forecaster cannot be traced or compiled, or its result has a wrong type, shape or dtype.
        """
        if not self._has_update:
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
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # Constants, such as the 0 of `torch.where(..., 0)`.
        method = "update" if name == "update" else "predict"  # The method of the forecaster that the function calls.
        with torch.inference_mode(False), torch.no_grad():
            fakes: list[Tensor] = [mode.from_tensor(_like(x)) for x in inputs]
            try:
                graph = trace(FUNCTIONS[name](self.forecaster), fakes)
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"cachedit_fx: `{method}` of forecaster {type(self.forecaster).__name__} cannot be traced"
                    f"{_place(self.forecaster, error)}: {type(error).__name__}: {cut(error)}\n{_CURE}"
                ) from error
            try:
                return self._compile(graph, fakes)
            except Exception as error:
                raise ConfigError(
                    f"cachedit_fx: the inner backend does not compile `{method}` of forecaster "
                    f"{type(self.forecaster).__name__}: {type(error).__name__}: {cut(error)}\nWhat to do: use another "
                    "operation, or set inner_backend='eager' to run it as it is."
                ) from error


class EagerForecaster(CompiledForecaster):
    """Runs a forecaster without compiling it, for uses that run too few steps for a compilation to pay off."""

    def __init__(self, forecaster: Forecaster) -> None:
        super().__init__(forecaster, lambda graph, _inputs: graph.forward)

    def _run(self, name: str, tensors: Tensors, numbers: Sequence[float]) -> Sequence[Tensor]:
        with torch.no_grad():
            return FUNCTIONS[name](self.forecaster)(*tensors, _on_device(numbers, tensors[0].device))


def _predict(forecaster: Forecaster) -> Callable[..., Tensors]:
    """Returns `predict` as a function of tensors that checks its result."""

    def predict(*inputs: Tensor) -> Tensors:
        *history, numbers = inputs
        value = _checked(forecaster, tuple(history), numbers)
        storages = {x.untyped_storage()._cdata for x in inputs}
        return (value.clone() if value.untyped_storage()._cdata in storages else value,)

    return predict


def _choose(forecaster: Forecaster) -> Callable[..., Tensors]:
    def run(*inputs: Tensor) -> Tensors:
        *history, verdict, numbers = inputs
        last = history[0]
        return (choose(last, _checked(forecaster, tuple(history), numbers), verdict),)

    return run


def _judge(forecaster: Forecaster) -> Callable[..., Tensors]:
    def run(*inputs: Tensor) -> Tensors:
        *history, value, verdict, numbers = inputs
        forecast = _checked(forecaster, tuple(history), numbers[:-2])
        return (judge(tuple(history), forecast, value, verdict, numbers[-2:]),)

    return run


def _update(forecaster: Forecaster) -> Callable[..., Tensors]:
    """Returns `update` as a function of tensors that checks its result."""

    def update(*inputs: Tensor) -> Tensors:
        *history, value, numbers = inputs
        found = forecaster.update(tuple(history), value, numbers)
        allowed = isinstance(found, tuple) and 1 <= len(found) <= forecaster.depth
        if not allowed or not all(_is_like(tensor, value) for tensor in found):
            got = f"({', '.join(map(_described, found[:3]))})" if isinstance(found, tuple) else _described(found)
            raise ConfigError(
                f"cachedit_fx: `update` of forecaster {type(forecaster).__name__} did not return a history.\n"
                f"  expected: a tuple of 1 to {forecaster.depth} (`depth`), each {_described(value)}\n"
                f"  found:    {got}"
            )
        return found

    return update


def _summary(forecaster: Forecaster) -> Callable[..., Tensors]:
    def run(*inputs: Tensor) -> Tensors:
        found = forecaster._summary(inputs[:-1])
        return (found,) if found is not None else ()

    return run


# By name: given a forecaster, a function of tensors that returns a tuple. The last argument contains the numbers.
FUNCTIONS = {"predict": _predict, "choose": _choose, "judge": _judge, "update": _update, "summary": _summary}


def _checked(forecaster: Forecaster, history: Tensors, numbers: Tensor) -> Tensor:
    """Returns the forecast.

    Raises:
        ConfigError: The forecast does not have the shape and dtype of the history.
    """
    value = forecaster.predict(history, numbers)
    if not _is_like(value, history[0]):
        raise ConfigError(
            f"cachedit_fx: `predict` of forecaster {type(forecaster).__name__} returned a value that does not fit the "
            f"history.\n  expected: {_described(history[0])}\n  found:    {_described(value)}"
        )
    return value


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Returns the numbers as a float32 tensor. It is copied from pinned memory, so the host does not wait."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    # Only memory of the CPU can be pinned, and the default device may be another one.
    return torch.tensor(numbers, dtype=torch.float32, device="cpu", pin_memory=True).to(device, non_blocking=True)


def _like(tensor: Tensor) -> Tensor:
    """Returns the tensor, or for an inference tensor an empty one with the same shape, stride, dtype and device.

    Inference tensors cannot be traced.
    """
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
    """Returns ` (at mine.py:12)`, the line in the forecaster's file that raised; empty if no line of it did."""
    file = inspect.getsourcefile(type(forecaster)) if type(forecaster).__module__ != "__main__" else None
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (at {str(file).rsplit('/', 1)[-1]}:{lines[-1]})" if lines else ""
