"""How a module is captured: whole if that can be, if need be with sizes that depend on data, or else in parts."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException

from cachedit_fx.backend import Backend


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to ask Dynamo for a graph.

    Attributes:
        whole: An error where the module does not become one graph (`fullgraph=True`); nothing was run then.
        captures_data: Numbers read off tensors, and shapes that depend on values, become part of the graph.
    """

    whole: bool
    captures_data: bool


# Without data first: sizes that depend on it are known to no one before the call. In parts it is the other way round,
# for a function that Dynamo once gave up on is skipped for good.
ATTEMPTS = (Attempt(True, False), Attempt(True, True), Attempt(False, True), Attempt(False, False))


class Attempts:
    """A module's compiled forward, by the first way that works: later calls begin with the one that did.

    Args:
        module: Called as it is; only its compiled forward is made here.
        backend: What compiles the graphs.
        compile_kwargs: The rest of `torch.compile`'s; with `fullgraph=True` parts are no way.
        before_each: Told of every attempt before it is made.
        ways: What is tried, in turn.
        call: What is compiled in place of the module's own call: a method of it.

    Attributes:
        plain: What is compiled.
        why_in_parts: What Dynamo said where the module could not be captured whole; empty if it could.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Backend,
        compile_kwargs: Mapping[str, Any],
        before_each: Callable[[Attempt], None] | None = None,
        ways: Sequence[Attempt] = ATTEMPTS,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.plain = call or module._call_impl
        self._before_each = before_each
        self._backend = backend
        self._kwargs = dict(compile_kwargs)
        is_whole = self._kwargs.pop("fullgraph", False)
        self._attempts = [way for way in ways if way.whole or not is_whole]
        self._file = inspect.getsourcefile(type(module))
        self._compiled: dict[Attempt, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self._works = False  # Whether the first of the attempts has worked.
        self.why_in_parts = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output. An attempt that fails has run nothing of the module.

        Raises:
            TorchDynamoException: No way is left; what the first of them met.
        """
        if self._works:
            attempt, *_ = self._attempts
            if self._before_each is not None:
                self._before_each(attempt)
            try:
                return self._run(attempt, args, kwargs)
            except BackendCompilerFailed:
                raise
            except (TorchDynamoException, FailOnRecompileLimitHit):
                pass  # What worked for other sizes does not for these.
        with self._lock:  # Other threads wait: they begin with the way that is found here.
            return self._find_a_way(args, kwargs)

    def _find_a_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Exception | None = None
        for number, attempt in enumerate([*self._attempts]):
            if self._before_each is not None:
                self._before_each(attempt)
            try:
                result = self._run(attempt, args, kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                if isinstance(error, BackendCompilerFailed):
                    raise
                first = first or error
                continue
            if first is not None:  # Only what worked tells that the fault was not the caller's.
                self.why_in_parts = self.why_in_parts or ("" if attempt.whole else self._describe(first))
                del self._attempts[:number]
            self._works = True
            return result
        assert first is not None
        raise first

    @property
    def way(self) -> Attempt:
        """The way that works, or the first that will be tried."""
        return self._attempts[0]

    def give_up(self) -> bool:
        """Leaves the way that was taken, because none of its graphs is worth caching. Returns whether there is another.

        A module that was captured whole is what it is; one in parts may fall into others.
        """
        with self._lock:
            is_last = self._attempts[0].whole or len(self._attempts) == 1
            if not is_last:
                del self._attempts[0]
                self._works = False
            return not is_last

    def _run(self, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if attempt not in self._compiled:
            options = self._kwargs.get("options")  # torch.compile takes out what is its own.
            given = {**self._kwargs, "options": dict(options)} if options else self._kwargs
            self._compiled[attempt] = torch.compile(
                self.plain,
                backend=self._backend.capturing(data=attempt.captures_data),
                fullgraph=attempt.whole,
                **given,
            )
        with _data_captured() if attempt.captures_data else contextlib.nullcontext():
            return self._compiled[attempt](*args, **kwargs)

    def _describe(self, error: Exception) -> str:
        """`model.py:12, "Data-dependent branching"`: the error itself would keep the call's tensors alive."""
        stack = list(getattr(error, "real_stack", None) or ())
        mine = [frame for frame in stack if frame.filename == self._file]
        place = "".join(f"{Path(frame.filename).name}:{frame.lineno}, " for frame in (mine or stack)[-1:])
        return f'{place}"{shorten(str(error).strip().splitlines()[0], 120)}"'


def _data_captured() -> contextlib.AbstractContextManager[None]:
    patch: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    )
    return patch
