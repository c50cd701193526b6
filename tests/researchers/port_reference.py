"""A plain-Python reference of skipped blocks for models whose streams are in containers, as a `Port` describes them.

It shares no code with `cachedit_fx` and uses no graph: it runs the model eagerly and replaces the calls of its blocks,
for any container of the blocks and any return value.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Port:
    """Where the streams of a block are in its arguments and in its result.

    Attributes:
        given: Place of each stream in the arguments: a path of indices, keys and attribute names that starts with the
            position or keyword of the argument.
        returned: Place of each stream in the result, in the same order; an empty path is the result itself. There are
            fewer places if callers compute a stream that the block does not return.
        like: Place of the container among the arguments that the result equals, except for the streams; None if the
            result holds nothing else.
        unfold: (Number of the call, stream in the shape that its block uses) -> stream in the common shape; `fold` is
            the inverse.
    """

    given: tuple[Path, ...] = ((0,),)
    returned: tuple[Path, ...] = ((),)
    like: Path | None = None
    unfold: Callable[[int, Tensor], Tensor] = lambda _, stream: stream
    fold: Callable[[int, Tensor], Tensor] = lambda _, stream: stream

    def read(self, number: int, container: Any, paths: tuple[Path, ...]) -> list[Tensor]:
        return [self.unfold(number, _get(container, path)) for path in paths]

    def written(self, number: int, container: Any, paths: tuple[Path, ...], streams: Sequence[Tensor]) -> Any:
        folded = [self.fold(number, stream) for stream in streams]
        return functools.reduce(
            lambda container, new: _put(container, *new), zip(paths, folded, strict=True), container
        )


HIDDEN = Port()  # The first argument and the result are the stream.
PAIR = Port(((0,), (1,)), ((0,), (1,)))
BRANCH = Port((), ())  # The blocks return the branch, which their callers add to the stream.


@dataclass
class PortReference:
    """Runs `model` with some calls of its blocks skipped.

    A reused step runs the first `fn` and the last `bn` calls. The calls between them are skipped: each returns its
    result of the last computed step, except that the last of them returns the current input streams of the first one
    plus the residuals of the last computed step.

    Args:
        blocks: The module of every block call, in the order of the calls; a module may occur several times.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    port: Port
    fn: int
    bn: int
    results: dict[int, Any] = field(default_factory=dict)  # The results of the skipped calls at the last computed step,
    added: list[Tensor] = field(default_factory=list)  # and the residual of each stream over them.
    is_handed_on: bool = False  # Whether the result of the last one was passed to the next block unchanged.

    def step(self, call: Callable[[nn.Module], Any], *, reuse: bool) -> Any:
        """The result of `call(model)`."""
        self.number, self.reuse = 0, reuse
        self.left: list[Tensor] = []  # The result of the last skipped call.
        with _called_as(self.blocks, self._call):
            output = call(self.model)
        assert self.number == len(self.blocks)  # Otherwise the reference misses a block call.
        return output

    def _call(self, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number, self.number = self.number, self.number + 1
        assert block is self.blocks[number]
        given = {**dict(enumerate(args)), **kwargs}
        if number == self.fn:
            self.entered = [stream.clone() for stream in self.port.read(number, given, self.port.given)]
        end = len(self.blocks) - self.bn  # The first call after the skipped ones.
        if self.fn <= number < end:
            return self._skip(number, given) if self.reuse else self._note(number, given, original)
        if number == end:
            given = self._enter(number, given)
        return _with(original, given)

    def _note(self, number: int, given: dict[Any, Any], original: Callable[..., Any]) -> Any:
        result = _with(original, given)
        self.left = self.port.read(number, result, self.port.returned)
        self.results[number] = (
            [stream.clone() for stream in self.left] if self.port.like is not None else _cloned(result)
        )
        self.added = [new - old for old, new in zip(self.entered, self.left, strict=False)]
        return result

    def _skip(self, number: int, given: dict[Any, Any]) -> Any:
        is_last = number == len(self.blocks) - self.bn - 1
        result, port = self.results[number], self.port
        if port.like is not None:
            result = port.written(number, _get(given, port.like), port.returned, result)
        if is_last and (self.bn == 0 or self.is_handed_on):
            streams = [old + more for old, more in zip(self.entered, self.added, strict=False)]
            return port.written(number, result, port.returned, streams[: len(port.returned)])
        return _cloned(result) if port.like is None else result

    def _enter(self, number: int, given: dict[Any, Any]) -> dict[Any, Any]:
        """The arguments of the call after the skipped ones. Operations between the two are skipped as well."""
        now = self.port.read(number, given, self.port.given)
        if not self.reuse:
            self.is_handed_on = [*map(id, now)] == [*map(id, self.left)]
            self.added = [new - old for old, new in zip(self.entered, now, strict=True)]
            return given
        streams = [old + more for old, more in zip(self.entered, self.added, strict=True)]
        return given if self.is_handed_on else self.port.written(number, given, self.port.given, streams)


def _with(call: Callable[..., Any], given: dict[Any, Any]) -> Any:
    """Calls `call` with arguments that are given by position and keyword."""
    by_position = [value for key, value in given.items() if isinstance(key, int)]
    return call(*by_position, **{key: value for key, value in given.items() if isinstance(key, str)})


@contextmanager
def _called_as(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Replaces every call of one of `blocks`, including its hooks, by `call(block, original call, ...)`."""
    before = {block: block.__dict__.get("_compiled_call_impl") for block in blocks}
    try:
        for block in before:
            block._compiled_call_impl = functools.partial(call, block, block._call_impl)
        yield
    finally:
        for block, impl in before.items():
            if impl is None:
                block.__dict__.pop("_compiled_call_impl", None)  # The None of the class is visible again.
            else:
                block._compiled_call_impl = impl


def _get(container: Any, path: Path) -> Any:
    for key in path:
        container = (
            getattr(container, key) if isinstance(key, str) and not isinstance(container, dict) else container[key]
        )
    return container


def _put(container: Any, path: Path, value: Any) -> Any:
    """A shallow copy of `container` with `value` at `path`."""
    if not path:
        return value
    key, inner = path[0], _put(_get(container, path[:1]), path[1:], value)
    if isinstance(container, tuple) and hasattr(container, "_replace"):
        return container._replace(**{key if isinstance(key, str) else container._fields[key]: inner})
    if dataclasses.is_dataclass(container):
        return dataclasses.replace(container, **{key: inner})
    if isinstance(container, tuple):
        return (*container[:key], inner, *container[key + 1 :])
    changed = copy.copy(container)
    changed[key] = inner
    return changed


def _cloned(value: Any) -> Any:
    """A copy that is not affected by in-place operations."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_cloned, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_cloned, value))
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _cloned(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in the output of a model: a tensor, or one of the common containers."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, list | tuple) else []


def build(model: Callable[[], nn.Module]) -> nn.Module:
    """A new model in eval mode, always with the same weights, and with gates that are not 0."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = model().eval().requires_grad_(False)
        for parameter in made.parameters():
            if parameter.numel() > 1 and not parameter.any():  # Gates and output projections start at zero.
                parameter.normal_(0, 0.1)
    return made
