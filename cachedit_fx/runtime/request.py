"""The names of requests: `with session(key):`, also around the steps of a generator."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
from collections.abc import Hashable
from contextvars import ContextVar, Token
from types import FrameType, TracebackType
from typing import NamedTuple

from cachedit_fx.errors import shown

_IS_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Named(NamedTuple):
    """A `session(key)` block of this context.

    Attributes:
        inside: `id` of the named generator that ran when the block was entered; None for none.
    """

    key: Hashable
    inside: int | None


_request: ContextVar[_Named | None] = ContextVar("cachedit_fx_request", default=None)

# Generators that are inside a block, with the keys of their blocks, the innermost last. A context variable would also
# name what the caller does between two values. The frame of a generator is on the stack only while it runs.
_generators: dict[FrameType, list[Hashable]] = {}


def session(key: Hashable) -> NamedRequest:
    """Names the request to which the calls inside the block belong, in this thread and async task.

    The steps of a request may be made in several threads, and between the steps of other requests. Its guidance
    branches are distinguished by their conditioning. Leaving the block ends no session, so a server may enter a block
    for every step. In a generator, or an async generator, the block names the calls that the generator makes.

    Raises:
        TypeError: `key` is not hashable, or None.
    """
    if key is None or not _is_hashable(key):
        raise TypeError(
            "cachedit_fx: session(key) needs a hashable key other than None, such as a string or a number, got "
            f"{shown(key)}"
        )
    return NamedRequest(key)


class NamedRequest(contextlib.ContextDecorator):
    """What `session(key)` returns: a context manager, which may also decorate a function."""

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._entered: list[FrameType | Token[_Named | None]] = []

    def _recreate_cm(self) -> NamedRequest:  # A decorated function may run in several threads, or recursively.
        return NamedRequest(self._key)

    def __enter__(self) -> None:
        generator = _generator_around(_outside_contextlib(sys._getframe(1)))
        if generator is not None:
            _generators.setdefault(generator, []).append(self._key)
            self._entered.append(generator)
        else:
            running = _running_generator()
            named = _Named(self._key, id(running) if running is not None else None)
            self._entered.append(_request.set(named))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = self._entered.pop()
        if isinstance(entered, Token):
            _request.reset(entered)
            return
        keys = _generators[entered]
        keys.pop()
        if not keys:
            del _generators[entered]


def current_request() -> Hashable | None:
    """The key of the innermost `session(key)` block around this call; None outside of all."""
    named, generator = _request.get(), _running_generator()
    if generator is not None and (named is None or named.inside != id(generator)):
        return _generators[generator][-1]
    return named.key if named is not None else None


def current_owner(request: Hashable | None) -> Hashable:
    """The owner of a generation: the name of the request or, without a name, the thread and the async task."""
    if request is not None:
        return ("named", request)
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return ("thread", threading.get_ident(), id(task) if task is not None else None)


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _running_generator() -> FrameType | None:
    """The innermost generator on the stack that is inside a block."""
    frame: FrameType | None = sys._getframe(1) if _generators else None
    while frame is not None and frame not in _generators:
        frame = frame.f_back
    return frame


def _generator_around(frame: FrameType | None) -> FrameType | None:
    """The generator whose code contains a `with` statement in `frame`; None if that code is not in a generator.

    If `contextlib` makes a context manager from the generator, the code that enters the context manager counts.
    """
    while frame is not None and frame.f_code.co_flags & _IS_GENERATOR:
        above = frame.f_back
        if above is None or not _is_contextlib(above):
            return frame
        frame = _outside_contextlib(above)
    return None


def _outside_contextlib(frame: FrameType | None) -> FrameType | None:
    while frame is not None and _is_contextlib(frame):
        frame = frame.f_back
    return frame


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"
