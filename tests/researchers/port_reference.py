"""A plain-Python reference of skipped blocks for models whose streams are in containers, which a `Port` describes.

It shares no code with `cachedit_fx` and knows no graph: it runs the model eagerly and replaces the calls of its blocks,
whatever holds the blocks and whatever they return.
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
    """Where a block's streams are, in what it is given and in what it returns.

    Attributes:
        given: Place of each stream in the arguments: a path of indices, keys and attribute names, whose first is the
            argument's position or keyword.
        returned: Place of each stream in the result, in the same order; an empty path is the result itself. There are
            fewer where callers make what the block does not return.
        like: Where among the arguments the container stands that the result is, but for the streams; None if the result
            holds nothing else.
        unfold: Number of the call and a stream as its block sees it -> the stream as all see it; `fold` goes back.
    """

    given: tuple[Path, ...] = ((0,),)
    returned: tuple[Path, ...] = ((),)
    like: Path | None = None
    unfold: Callable[[int, Tensor], Tensor] = lambda _, stream: stream
    fold: Callable[[int, Tensor], Tensor] = lambda _, stream: stream

    def read(self, number: int, held: Any, paths: tuple[Path, ...]) -> list[Tensor]:
        return [self.unfold(number, _get(held, path)) for path in paths]

    def written(self, number: int, held: Any, paths: tuple[Path, ...], streams: Sequence[Tensor]) -> Any:
        folded = [self.fold(number, stream) for stream in streams]
        return functools.reduce(lambda held, new: _put(held, *new), zip(paths, folded, strict=True), held)


HIDDEN = Port()  # The first argument is the stream, and so is the result.
PAIR = Port(((0,), (1,)), ((0,), (1,)))
BRANCH = Port((), ())  # The blocks give what their callers add to the stream: that it is what it was is all there is.


@dataclass
class PortReference:
    """Runs `model` with some calls of its blocks skipped.

    A reused step runs the first `fn` calls and the last `bn`. What stands between them is not run: each block there
    gives what it gave at the last computed step, except that the streams leave the last of them as they enter the
    first one now, with what was added to them at the last computed step.

    Args:
        blocks: The module of every block call, in the order of the calls; one may be there several times.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    port: Port
    fn: int
    bn: int
    results: dict[int, Any] = field(default_factory=dict)  # Of every skipped call at the last computed step,
    added: list[Tensor] = field(default_factory=list)  # and what they added to each stream.
    is_handed_on: bool = False  # What the last of them returned went to the next block as it was.

    def step(self, call: Callable[[nn.Module], Any], *, reuse: bool) -> Any:
        """What `call(model)` returns."""
        self.number, self.reuse = 0, reuse
        self.left: list[Tensor] = []  # What the last of the skipped calls returned.
        with _called_as(self.blocks, self._call):
            output = call(self.model)
        assert self.number == len(self.blocks)  # Or the reference does not reach what it is to skip.
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
        """Behind the skipped calls. What stands between the last of them and this one is skipped with them."""
        now = self.port.read(number, given, self.port.given)
        if not self.reuse:
            self.is_handed_on = [*map(id, now)] == [*map(id, self.left)]
            self.added = [new - old for old, new in zip(self.entered, now, strict=True)]
            return given
        streams = [old + more for old, more in zip(self.entered, self.added, strict=True)]
        return given if self.is_handed_on else self.port.written(number, given, self.port.given, streams)


def _with(call: Callable[..., Any], given: dict[Any, Any]) -> Any:
    """`call` with arguments under their positions and keywords."""
    by_position = [value for key, value in given.items() if isinstance(key, int)]
    return call(*by_position, **{key: value for key, value in given.items() if isinstance(key, str)})


@contextmanager
def _called_as(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Lets every call of one of `blocks`, its hooks included, be `call(block, what it would have been, ...)`."""
    before = {block: block.__dict__.get("_compiled_call_impl") for block in blocks}
    try:
        for block in before:
            block._compiled_call_impl = functools.partial(call, block, block._call_impl)
        yield
    finally:
        for block, impl in before.items():
            if impl is None:
                block.__dict__.pop("_compiled_call_impl", None)  # The class's own None shows again.
            else:
                block._compiled_call_impl = impl


def _get(held: Any, path: Path) -> Any:
    for key in path:
        held = getattr(held, key) if isinstance(key, str) and not isinstance(held, dict) else held[key]
    return held


def _put(held: Any, path: Path, value: Any) -> Any:
    """A shallow copy of `held` with `value` at `path`."""
    if not path:
        return value
    key, inner = path[0], _put(_get(held, path[:1]), path[1:], value)
    if isinstance(held, tuple) and hasattr(held, "_replace"):
        return held._replace(**{key if isinstance(key, str) else held._fields[key]: inner})
    if dataclasses.is_dataclass(held):
        return dataclasses.replace(held, **{key: inner})
    if isinstance(held, tuple):
        return (*held[:key], inner, *held[key + 1 :])
    changed = copy.copy(held)
    changed[key] = inner
    return changed


def _cloned(value: Any) -> Any:
    """A copy that no in-place operation reaches."""
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
    """The tensors in what a model returned: a tensor, or any of the containers that people return."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, list | tuple) else []


def build(model: Callable[[], nn.Module]) -> nn.Module:
    """A new model in eval mode, always with the same weights; none of its gates is closed."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = model().eval().requires_grad_(False)
        for parameter in made.parameters():
            if parameter.numel() > 1 and not parameter.any():  # Gates and output projections start at zero.
                parameter.normal_(0, 0.1)
    return made
