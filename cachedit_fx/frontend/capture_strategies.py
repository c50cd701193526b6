"""How a module is captured: whole if that can be, if need be with sizes that depend on data, or else in parts."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from cachedit_fx.frontend.backend import Backend
from cachedit_fx.runtime.cached_call import CachedCall
from cachedit_fx.runtime.session import current_call

MAX_GRAPHS = 64  # Of one class of modules: past them Dynamo compiles no more, however often the graphs are used.
MAX_SIGNATURES = 1024
PAID_OFF = 3  # Calls that a graph has to serve before it makes room for another one.

# What Dynamo says where a function is past its limit: as an error, with `fullgraph=True`, and as a statistic.
_NO_GRAPH = "Compilation was not attempted"
_LIMIT = "Dynamo recompile limit exceeded"

# What Dynamo says, before it runs anything, while torch.fx traces. There is one flag for all threads: another thread
# that compiles a piece or a forecaster sets it.
_TRACED = "you are using FX to symbolically trace a dynamo-optimized function"


@dataclass(frozen=True, slots=True)
class CaptureStrategy:
    """One way to ask Dynamo for a graph.

    Attributes:
        whole: An error where the module does not become one graph (`fullgraph=True`); nothing was run then.
        captures_data: Numbers read off tensors, and shapes that depend on values, become part of the graph.
    """

    whole: bool
    captures_data: bool


# Without data first: sizes that depend on it are known to no one before the call. In parts it is the other way round,
# for a function that Dynamo once gave up on is skipped for good.
CAPTURE_STRATEGIES = (
    CaptureStrategy(True, False),
    CaptureStrategy(True, True),
    CaptureStrategy(False, True),
    CaptureStrategy(False, False),
)


class CaptureStrategies:
    """A module's compiled forward, by the first way that works: later calls begin with the one that did.

    Args:
        module: Called as it is; only its compiled forward is made here.
        backend: What compiles the graphs.
        compile_kwargs: The rest of `torch.compile`'s; with `fullgraph=True` parts are no way.
        before_each: Told of every strategy before it is tried.
        strategies: What is tried, in turn.
        call: What is compiled in place of the module's own call: a method of it.

    Attributes:
        plain: What is compiled.
        why_in_parts: What Dynamo said where the module could not be captured whole; empty if it could.
        full_at: As many graphs as Dynamo may compile, once it would need one more; 0 before. From then on it runs the
            graphs that there are, and plain code where none of them fits.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Backend,
        compile_kwargs: Mapping[str, Any],
        before_each: Callable[[CaptureStrategy], None] | None = None,
        strategies: Sequence[CaptureStrategy] = CAPTURE_STRATEGIES,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.plain = call or module._call_impl
        self._before_each = before_each
        self._backend = backend
        self._kwargs = dict(compile_kwargs)
        is_whole = self._kwargs.pop("fullgraph", False)
        self._graphs = _graphs_of(type(module))
        self._strategies = [strategy for strategy in strategies if strategy.whole or not is_whole]
        self._file = inspect.getsourcefile(type(module))
        self._compiled: dict[CaptureStrategy, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self._works = False  # Whether the first of the strategies has worked.
        self._served: set[Hashable] = set()  # Signatures of calls that it served.
        self.why_in_parts = ""
        self.full_at = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output. A strategy that fails has run nothing of the module.

        One is an exception: where calls of others brought the class past Dynamo's limit, Dynamo says so after the first
        call has run plain; that is made again.

        Raises:
            TorchDynamoException: No way is left; what the first of them met.
        """
        signature = _signature(args, kwargs)
        if self._works and (signature in self._served or self.full_at):
            strategy, *_ = self._strategies
            if self._before_each is not None:
                self._before_each(strategy)
            try:
                return self._run(strategy, args, kwargs)
            except BackendCompilerFailed:
                raise
            except TorchDynamoException:
                pass  # What worked for other sizes does not for these.
        # Other threads wait: they begin with the way that is found here, and find the graph that is compiled here. By
        # itself Dynamo would compile one for each of them.
        with self._lock:
            result = self._find_strategy(args, kwargs)
            if len(self._served) >= MAX_SIGNATURES:
                self._served.clear()
            self._served.add(signature)
            return result

    def _find_strategy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Exception | None = None
        for number, strategy in enumerate([*self._strategies]):
            if self._before_each is not None:
                self._before_each(strategy)
            try:
                result = self._run(strategy, args, kwargs)
            except TorchDynamoException as error:
                if isinstance(error, BackendCompilerFailed):
                    raise
                first = first or error
                continue
            if first is not None:  # Only what worked tells that the fault was not the caller's.
                self.why_in_parts = self.why_in_parts or ("" if strategy.whole else self._describe(first))
                del self._strategies[:number]
            self._works = True
            return result
        assert first is not None
        raise first

    @property
    def strategy(self) -> CaptureStrategy:
        """The way that works, or the first that will be tried."""
        return self._strategies[0]

    def give_up(self) -> bool:
        """Leaves the way that was taken, because none of its graphs is worth caching. Returns whether there is another.

        A module that was captured whole is what it is; one in parts may fall into others.
        """
        with self._lock:
            is_last = self._strategies[0].whole or len(self._strategies) == 1
            if not is_last:
                del self._strategies[0]
                self._works = False
            return not is_last

    def _run(self, strategy: CaptureStrategy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, limit = current_call(), self._limit()
        try:
            with _settings(strategy, limit):
                try:
                    return self._run_within(limit, strategy, args, kwargs)
                except RuntimeError as error:
                    if _TRACED not in str(error) or _is_traced_here(args, kwargs):
                        raise
                with _tracing_elsewhere():
                    return self._run_within(limit, strategy, args, kwargs)
        finally:
            if call is not None:
                with _graphs_lock:
                    self._graphs.update(cached_call for cached_call, *_ in call.ran)

    def _limit(self) -> int:
        """Graphs that Dynamo may compile of one function: its own limit, and one more for each that paid off.

        A graph per step would cost more than it saves, as where hooks are made anew for every step; a graph per length
        of the prompt serves a generation, or many.
        """
        given, dynamo_limit = self._kwargs.get("recompile_limit"), torch._dynamo.config.recompile_limit
        if given is not None:
            return int(given)
        with _graphs_lock:
            paid_off = sum(graph.num_calls >= PAID_OFF for graph in self._graphs)
        return max(dynamo_limit, min(MAX_GRAPHS, dynamo_limit + paid_off))

    def _run_within(self, limit: int, strategy: CaptureStrategy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if strategy.whole and not self.full_at:
            try:
                return self._compiled_for(strategy)(*args, **kwargs)
            except FailOnRecompileLimitHit:
                self.full_at = limit
            except RuntimeError as error:  # Other calls of the class were past the limit before: its code is marked.
                if _NO_GRAPH not in str(error):
                    raise
                self.full_at = limit
        # No error past the limit: Dynamo marks the function, and looks for one of its graphs without compiling more.
        hits = _limits_hit()
        result = self._compiled_for(replace(strategy, whole=False))(*args, **kwargs)
        if _limits_hit() > hits and not self.full_at:
            self.full_at = limit
        return result

    def _compiled_for(self, strategy: CaptureStrategy) -> Callable[..., Any]:
        if strategy not in self._compiled:
            options = self._kwargs.get("options")  # torch.compile takes out what is its own.
            given = {**self._kwargs, "options": dict(options)} if options else self._kwargs
            self._compiled[strategy] = torch.compile(
                self.plain,
                backend=self._backend.capturing(data=strategy.captures_data),
                fullgraph=strategy.whole,
                **given,
            )
        return self._compiled[strategy]

    def _describe(self, error: Exception) -> str:
        """`model.py:12, "Data-dependent branching"`: the error itself would keep the call's tensors alive."""
        stack = list(getattr(error, "real_stack", None) or ())
        mine = [frame for frame in stack if frame.filename == self._file]
        place = "".join(f"{Path(frame.filename).name}:{frame.lineno}, " for frame in (mine or stack)[-1:])
        return f'{place}"{shorten(str(error).strip().splitlines()[0], 120)}"'


def _signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls that Dynamo compiles no new graph for, as far as the arguments tell."""
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
    """Dynamo's, for one call. The limit is among them, for not every version of `torch.compile` takes it."""
    changed: dict[str, Any] = {}
    if strategy.captures_data:
        changed |= dict(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    if limit != torch._dynamo.config.recompile_limit:
        changed |= dict(recompile_limit=limit)
    with torch._dynamo.config.patch(**changed) if changed else contextlib.nullcontext():
        yield


def _is_traced_here(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is this thread that traces the call, by `torch.fx.symbolic_trace` or `make_fx`."""
    return get_proxy_mode() is not None or any(isinstance(x, fx.Proxy) for x in pytree.tree_leaves((args, kwargs)))


def _tracing_elsewhere() -> contextlib.AbstractContextManager[None]:
    """Lets Dynamo work while another thread traces. The setting is this thread's own; older versions lack it."""
    name = "force_compile_during_fx_trace"
    if not hasattr(torch._dynamo.config, name):
        return contextlib.nullcontext()
    changed: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(name, True)
    return changed


_graphs: weakref.WeakKeyDictionary[type[nn.Module], weakref.WeakSet[CachedCall]] = weakref.WeakKeyDictionary()
_graphs_lock = threading.Lock()


def _graphs_of(cls: type[nn.Module]) -> weakref.WeakSet[CachedCall]:
    """The guarded graphs that modules of a class have run: Dynamo counts by code, whichever module it compiles for."""
    with _graphs_lock:
        return _graphs.setdefault(cls, weakref.WeakSet())


def _limits_hit() -> int:
    """How often Dynamo found a function past its limit, in this process."""
    return sum(count for text, count in counters["unimplemented"].items() if text.startswith(_LIMIT))
