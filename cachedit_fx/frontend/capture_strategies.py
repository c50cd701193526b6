"""Capture strategies: a module is captured as one graph if possible, with sizes that depend on data if necessary."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.frontend.layer_hooks import initialize_hooks
from cachedit_fx.frontend.repeated_blocks import traced_once
from cachedit_fx.frontend.torch_internals import (
    LOGS,
    NO_FRAMES,
    NOT_ATTEMPTED,
    TRACED_BY_FX,
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    is_traced_here,
    num_limits_reached,
    patched_config,
    recompile_limit,
    without_log_calls,
)
from cachedit_fx.frontend.uncached import IN_HOOK, forward_hooks_of
from cachedit_fx.patterns.nodes import SourceLine
from cachedit_fx.runtime.cached_call import CachedCall
from cachedit_fx.runtime.model_call import current_call

log = logging.getLogger(__name__)

MAX_GRAPHS = 64  # The largest recompile limit for one class of modules, however often the graphs are used.
MAX_SIGNATURES = 1024
CALLS_TO_RAISE_LIMIT = 3  # A graph that has served so many calls raises the recompile limit by one.


@dataclass(frozen=True, slots=True)
class CaptureStrategy:
    """One way of capturing.

    Attributes:
        whole: Raise an error if the module is not one graph (`fullgraph=True`). Nothing of it has run then.
        captures_data: Numbers that are read from tensors, and shapes that depend on values, are part of the graph. If
            the module is one graph, its log calls are left out, which would break it.
    """

    whole: bool
    captures_data: bool


# The second is raised by PyTorch's symbolic shapes, and Dynamo does not always wrap it in an error of its own.
CAPTURE_ERRORS = (TorchDynamoException, GuardOnDataDependentSymNode)

# Whole graphs are first captured without data, since sizes that depend on data are unknown before the call. Parts are
# first captured with data, since Dynamo permanently skips a function that it gave up on.
CAPTURE_STRATEGIES = (
    CaptureStrategy(True, False),
    CaptureStrategy(True, True),
    CaptureStrategy(False, True),
    CaptureStrategy(False, False),
)


class CaptureStrategies:
    """The compiled forward of a module, captured with the first strategy that works. Later calls start with that one.

    Args:
        module: The module, which is not changed.
        backend: Compiles the graphs.
        compile_kwargs: The other arguments of `torch.compile`. With `fullgraph=True`, capture in parts is not tried.
        before_each: Called with every strategy before it is tried.
        strategies: The strategies, in the order in which they are tried.
        call: A method of the module that is compiled instead of the module's own call.
        may_break: Whether calls that need more graphs than the recompile limit run uncompiled.

    Attributes:
        plain: The function that is compiled.
        why_in_parts: Dynamo's reason why the module could not be captured as one graph; empty if it could.
        line_in_parts: The line of code at which it could not.
        limit_reached: The recompile limit, once a call needs one graph more; 0 before. From then on, Dynamo runs the
            existing graphs, and the plain code if none of them fits.
        num_blocks_traced: The number of calls of blocks that Dynamo traced in the last capture.
        num_blocks_repeated: The number of calls of blocks that repeat the trace of another block.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Backend,
        compile_kwargs: Mapping[str, Any],
        before_each: Callable[[CaptureStrategy], None] | None = None,
        strategies: Sequence[CaptureStrategy] = CAPTURE_STRATEGIES,
        call: Callable[..., Any] | None = None,
        *,
        may_break: bool = True,
    ) -> None:
        self.plain = call or module._call_impl
        self._may_break = may_break
        self._module = weakref.ref(module)
        self._before_each = before_each
        self._backend = backend
        self._kwargs = dict(compile_kwargs)
        is_whole = self._kwargs.pop("fullgraph", False)
        self._graphs = _graphs_of(type(module))
        self._strategies = [strategy for strategy in strategies if strategy.whole or not is_whole]
        self._file = _source_file(type(module))
        self._compiled: dict[CaptureStrategy, Callable[..., Any]] = {}
        self._lock = released_in_child(threading.RLock())
        self._has_worked = False  # Whether the first of the strategies has worked.
        self._signatures: set[Hashable] = set()  # Of the calls that it has served.
        self._has_no_frames = False  # Whether Dynamo captures nothing of the module.
        self.why_in_parts = self.line_in_parts = ""
        self.limit_reached = 0
        self.num_blocks_traced = self.num_blocks_repeated = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module. A strategy that fails has run nothing of the module.

        If the module may break up, there are two exceptions, which Dynamo reports after it has run the first call as
        plain code: calls of other modules brought the class past the recompile limit, or nothing of the module can be
        captured. The call is made again.

        Raises:
            TorchDynamoException, GuardOnDataDependentSymNode: All strategies failed. The error of the first is raised.
            FailOnRecompileLimitHit: The recompile limit is reached, and the module may not run uncompiled.
        """
        signature = signature_of(args, kwargs)
        if self._has_worked and (signature in self._signatures or self.limit_reached):
            strategy, *_ = self._strategies
            if self._before_each is not None:
                self._before_each(strategy)
            try:
                return self._run(strategy, args, kwargs)
            except BackendCompilerFailed:
                raise
            except CAPTURE_ERRORS:
                pass  # The strategy worked for other sizes, but does not for these.
        # Other threads wait, and then use the strategy that is found and the graph that is compiled here. Dynamo alone
        # would compile a graph for each thread.
        with self._lock:
            result = self._find_strategy(args, kwargs)
            if len(self._signatures) >= MAX_SIGNATURES:
                self._signatures.clear()
            self._signatures.add(signature)
            return result

    def _find_strategy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Exception | None = None
        initialize_hooks(self._module())
        for number, strategy in enumerate([*self._strategies]):
            if self._before_each is not None:
                self._before_each(strategy)
            try:
                result = self._run(strategy, args, kwargs)
            except CAPTURE_ERRORS as error:
                if isinstance(error, BackendCompilerFailed):
                    raise
                first = first or error
                continue
            if first is not None:  # Since another strategy worked, the caller is not to blame for the error.
                if not strategy.whole and not self.why_in_parts:
                    self.why_in_parts, self.line_in_parts = self.describe(first), self._line_of(first)
                if strategy.whole and str(first).startswith(LOGS):
                    log.info("cachedit_fx: log calls are left out of the compiled forward (%s)", self.describe(first))
                del self._strategies[:number]
            self._has_worked = True
            return result
        assert first is not None
        raise first

    @property
    def backend(self) -> Backend:
        """The backend of the graphs that the present strategy captures."""
        return self._backend.capturing(data=self.strategy.captures_data)

    @property
    def strategy(self) -> CaptureStrategy:
        """The strategy that works, or the first that will be tried."""
        return self._strategies[0]

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """The settings of Dynamo with which the present strategy captures."""
        return _settings(self.strategy, self._limit())

    def drop_strategy(self) -> bool:
        """Drops the present strategy, because none of its graphs can be cached. Returns whether another one is left.

        A module that was captured as one graph keeps its strategy. Another strategy may capture other parts.
        """
        with self._lock:
            is_last = self._strategies[0].whole or len(self._strategies) == 1
            if not is_last:
                del self._strategies[0]
                self._has_worked = False
            return not is_last

    def _run(self, strategy: CaptureStrategy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, limit = current_call(), self._limit()
        try:
            with _settings(strategy, limit):
                try:
                    return self._run_within(limit, strategy, args, kwargs)
                except RuntimeError as error:
                    if TRACED_BY_FX not in str(error) or is_traced_here(args, kwargs):
                        raise
                # The setting is this thread's own.
                with patched_config({"force_compile_during_fx_trace": True}):
                    return self._run_within(limit, strategy, args, kwargs)
        finally:
            if call is not None:
                with _graphs_lock:
                    self._graphs.update(cached_call for cached_call, *_ in call.ran)

    def _limit(self) -> int:
        """The recompile limit: Dynamo's own, plus one for each graph that has served enough calls.

        A graph per prompt length serves a whole generation or several. A graph per step (if hooks are created again for
        every step) would cost more than it saves.
        """
        given, dynamo_limit = self._kwargs.get("recompile_limit"), recompile_limit()
        if given is not None:
            return int(given)
        with _graphs_lock:
            num_used = sum(graph.num_calls >= CALLS_TO_RAISE_LIMIT for graph in self._graphs)
        return max(dynamo_limit, min(MAX_GRAPHS, dynamo_limit + num_used))

    def _run_within(self, limit: int, strategy: CaptureStrategy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if strategy.whole and not self.limit_reached and not self._has_no_frames:
            try:
                with traced_once(self._module()) as blocks:
                    result = self._compiled_for(strategy)(*args, **kwargs)
                if blocks.num_traced:
                    self.num_blocks_traced, self.num_blocks_repeated = blocks.num_traced, blocks.num_repeated
                return result
            except FailOnRecompileLimitHit:
                if not self._may_break:
                    raise
                self.limit_reached = limit
            except RuntimeError as error:  # Other calls of the class reached the limit before, which marked its code.
                is_past_limit = NOT_ATTEMPTED in str(error) and bool(num_limits_reached())
                if not is_past_limit and NO_FRAMES not in str(error):
                    raise
                if not self._may_break:
                    raise FailOnRecompileLimitHit(str(error)) from error
                if is_past_limit:
                    self.limit_reached = limit
                else:
                    self._has_no_frames = True
        # Without `fullgraph`, the limit is not an error: Dynamo marks the function, uses its graphs, and compiles no
        # more.
        num_before = num_limits_reached()
        result = self._compiled_for(replace(strategy, whole=False))(*args, **kwargs)
        if num_limits_reached() > num_before and not self.limit_reached:
            self.limit_reached = limit
        return result

    def _compiled_for(self, strategy: CaptureStrategy) -> Callable[..., Any]:
        if strategy not in self._compiled:
            options = self._kwargs.get("options")  # A copy, since torch.compile removes its own options.
            given = {**self._kwargs, "options": dict(options)} if options else self._kwargs
            self._compiled[strategy] = torch.compile(
                self.plain,
                backend=self._backend.capturing(data=strategy.captures_data),
                fullgraph=strategy.whole,
                **given,
            )
        return self._compiled[strategy]

    def describe(self, error: Exception) -> str:
        """`model.py:12, "Data-dependent branching"`. The error itself would keep the tensors of the call alive.

        If the error is from a forward hook, its name follows the place: `model.py:12, in the hook "moved", "..."`.
        """
        stack = _stack_of(error)
        place = "".join(f"{Path(frame.filename).name}:{frame.lineno}, " for frame in self._own_frame(stack))
        model = getattr(self.plain, "__self__", None)
        found = forward_hooks_of(model) if isinstance(model, nn.Module) else {}
        hooks = {(code.co_filename, code.co_name): name for name, code in found.items()}
        hook = next((hooks[key] for f in reversed(stack) if (key := (f.filename, f.name)) in hooks), "")
        place += f'{IN_HOOK}"{hook}", ' if hook else ""
        return f'{place}"{shorten(str(error).strip().splitlines()[0], 120)}"'

    def _line_of(self, error: Exception) -> str:
        """The text of the line that `describe` names."""
        return "".join(SourceLine(frame.filename, frame.lineno).text for frame in self._own_frame(_stack_of(error)))

    def _own_frame(self, stack: list[Any]) -> list[Any]:
        """The innermost frame in the file of the module, or else the innermost one; empty if there is none."""
        mine = [frame for frame in stack if frame.filename == self._file]
        return (mine or stack)[-1:]


def _stack_of(error: Exception) -> list[Any]:
    """The frames of the code that Dynamo was tracing."""
    return list(getattr(error, "real_stack", None) or ())


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls that can use the same graph, as far as the arguments show."""
    return (*map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, list | tuple):
        return type(value), *map(_kind, value)
    if isinstance(value, Mapping):
        return type(value), *((name, _kind(one)) for name, one in value.items())
    return value if isinstance(value, bool | str | None) else type(value)


@contextlib.contextmanager
def _settings(strategy: CaptureStrategy, limit: int) -> Iterator[None]:
    """Sets Dynamo's configuration for one call. Not every version of `torch.compile` has the limit as an argument."""
    changed: dict[str, Any] = {}
    if strategy.captures_data:
        changed |= dict(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    if strategy.captures_data and strategy.whole:
        changed |= without_log_calls()
    if limit != recompile_limit():
        changed |= dict(recompile_limit=limit)
    with patched_config(changed) if changed else contextlib.nullcontext():
        yield


_graphs: weakref.WeakKeyDictionary[type[nn.Module], weakref.WeakSet[CachedCall]] = weakref.WeakKeyDictionary()
_graphs_lock = released_in_child(threading.Lock())


def _source_file(kind: type[nn.Module]) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except (OSError, TypeError):  # Its module is not imported: `exec` has run the code.
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        return code and code.co_filename


def _graphs_of(cls: type[nn.Module]) -> weakref.WeakSet[CachedCall]:
    """The cached graphs that modules of a class have run. Dynamo counts graphs by code, not by module."""
    with _graphs_lock:
        return _graphs.setdefault(cls, weakref.WeakSet())
