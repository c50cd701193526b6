"""A reference for block caching that knows a template and no graph: it runs a model eagerly and skips blocks.

    blocks[:fn] run | streams enter | blocks[fn:stop] are skipped | streams leave | blocks[stop:] run

Work between two blocks counts as part of the block before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.template import BlockTemplate

Call = Mapping[str, Any]  # The keyword arguments of one call.
Place = int | str  # The position or the name of an argument.


class UncheckableError(RuntimeError):
    """`check_pattern` cannot check this model or these inputs. The message states why, and what helps."""


class TemplateReference:
    """Runs a model eagerly and can skip its middle blocks. All it uses from the graph are the paths of the blocks.

    Attributes:
        blocks: Path and module of every block call, in execution order.
        fn: Index of the first block that is skipped.
        stop: Index of the first block after the skipped ones.
        moved: Relative L1 change since step 0 of what the Fn blocks add to `hidden_states`; None if it is unknown.
    """

    def __init__(self, template: BlockTemplate, model: nn.Module, paths: Sequence[str], fn: int, bn: int) -> None:
        self.template, self.model = template, model
        self.blocks = [(path, _module_at(model, path)) for path in paths]
        self.fn, self.stop = fn, len(self.blocks) - bn
        self.moved: float | None = None
        self._index = {role: i for i, role in enumerate(template.returns)}  # Position of each role in a result.
        # The following are from the last computed step.
        self._results: dict[int, Any] = {}  # What each block returned.
        self._received: dict[tuple[int, str], Tensor] = {}  # What a block took that is no value of the block before.
        self._left: dict[str, Tensor] = {}  # The streams that left the skipped blocks.
        self._added: dict[str, Tensor] = {}  # What the skipped blocks added to the streams.
        self._is_passed_unchanged = True  # Block `stop` takes the streams as block `stop - 1` returns them.
        self._last_probe: Tensor | None = None  # What the Fn blocks added to hidden_states.

    def run(self, call: Call, *, reuse: bool) -> list[Tensor]:
        """Runs the model, with the middle blocks skipped if `reuse`, and returns the tensors of its output."""
        self._reuse = reuse
        output = self._run(call, self._call)
        if self._received and not reuse:
            self._run(call, self._probe)
        return tensors_of(output)

    def _run(self, call: Call, instead: Callable[..., Any]) -> Any:
        self._number = 0
        self._values: list[Any] = []  # What the previous block returned.
        with _called_as([block for _, block in self.blocks], instead):
            output = self.model(**call)
        count = f"{self._number} of its {len(self.blocks)} blocks were called as modules"
        require(self._number == len(self.blocks), f"{count}; only calls of the form block(...) can be replaced")
        return output

    def _next(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, dict[Place, Any]]:
        """Returns the number of this block call, and its arguments."""
        number, self._number = self._number, self._number + 1
        is_expected = number < len(self.blocks) and self.blocks[number][1] is block
        require(is_expected, "the blocks run in another order than in the graph")
        arguments: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
        return number, dict(arguments)

    def _probe(self, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Detects a loop that holds a stream of its own.

        The first block returns something else than at the computed step, and all other blocks return the same. An
        input of a later block that changes nevertheless comes from the loop.
        """
        number, given = self._next(block, args, kwargs)
        for role in self.template.streams_out if number > 1 else ():
            received = self._received.get((number, role))
            require(
                received is None or torch.equal(given[self._place(number, given, role)], received),
                f"between {self.blocks[number - 1][0]} and {self.blocks[number][0]}, the loop does more than change "
                f"what the block returned: it holds {role} or another stream in a variable of its own",
            )
        return self._again(number, lambda value: value * 1.5 if number == 0 and value.is_floating_point() else value)

    def _call(self, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number, given = self._next(block, args, kwargs)
        places = {role: self._place(number, given, role) for role in self.template.streams_out}
        streams = {role: given[place] for role, place in places.items()}
        if number and not self._reuse:
            self._follow(number, given, places)
        if number == self.stop and not self._is_passed_unchanged:
            if self._reuse:
                streams = self._supplied()
                given |= {places[role]: stream for role, stream in streams.items()}
            else:
                self._leave(streams)
        if number == 0:
            self._start = streams[HIDDEN].clone()
        if number == self.fn:
            self._compare_probe(streams[HIDDEN])
            self._entered = {role: stream.clone() for role, stream in streams.items()}
        if self.fn <= number < self.stop and self._reuse:
            return self._skip(number)
        result = original(
            *(v for k, v in given.items() if isinstance(k, int)),
            **{k: v for k, v in given.items() if isinstance(k, str)},
        )
        self._note(number, result)
        return result

    def _place(self, number: int, given: Mapping[Place, Any], role: str) -> Place:
        """Returns the place at which a block takes a stream: the argument of its name, or its position in `takes`."""
        path, block = self.blocks[number]
        names = list(inspect.signature(block.forward).parameters)
        name, position = self.template.streams.get(role, role), self.template.takes.index(role)
        places: list[Place] = [name]
        if name in names:
            places.append(names.index(name))
        elif name not in given:
            places = [position, *names[position : position + 1]]
        found = next((place for place in places if isinstance(given.get(place), Tensor)), None)
        require(
            found is not None,
            f"{path} takes ({', '.join(names)}), and none of these is a tensor for {role}: none is named {name!r}, and "
            f"none is at position {position}, its position in takes; only blocks whose streams are arguments of their "
            "own can be checked",
        )
        return found if found is not None else ""

    def _follow(self, number: int, given: Mapping[Place, Any], places: Mapping[str, Place]) -> None:
        """Compares `returns` with the arguments that become of the values of the previous block."""
        before, path = self.blocks[number - 1][0], self.blocks[number][0]
        for role, place in places.items():
            index = next((i for i, value in enumerate(self._values) if value is given[place]), None)
            if index is None:
                self._received[number, role] = given[place].clone()
                self._is_passed_unchanged &= number != self.stop
            elif len(self._values) > len(self.template.returns):
                self._index[role] = (
                    index  # The block returns more than is declared, so `returns` has no position for it.
                )
            elif index != self._index[role]:
                raise AssertionError(
                    f"cachedit_fx: {self.template}: takes, returns and streams contradict each other.\n"
                    f"  expected: value {index} of what {before} returns is {self._role(index)}, by returns\n"
                    f"  found:    {path} takes it as {_argument(self.blocks[number][1], place)}, which is {role}\n"
                    "What to do: list the roles in returns in the order of the block's return statement, and give in "
                    "streams the name of each argument (or list the roles in takes in the order of the arguments)."
                )
        given_ids = {id(given[place]) for place in places.values()}
        passed = [v for v in self._values if isinstance(v, Tensor) and any(v is g for g in given.values())]
        are_streams = all(id(value) in given_ids for value in passed)
        require(are_streams, f"{before} passes more to {path} than the streams of the template")

    def _role(self, index: int) -> str:
        return next(role for role, i in self._index.items() if i == index)

    def _note(self, number: int, result: Any) -> None:
        """Stores what a block returned at a computed step."""
        path, is_plain = self.blocks[number][0], isinstance(result, Tensor | list | tuple)
        require(
            is_plain,
            f"{path} returns a {type(result).__name__}; only blocks that return a tensor or a tuple of tensors can be "
            "checked",
        )
        self._values = [result] if isinstance(result, Tensor) else list(result)
        returns = self.template.returns
        if len(self._values) < len(returns):
            raise AssertionError(
                f"cachedit_fx: {self.template}: a block returns fewer values than returns declares.\n"
                f"  expected: {len(returns)} values ({', '.join(returns)})\n"
                f"  found:    {len(self._values)} from {path}\n"
                "What to do: list in returns the values of the block's return statement, in their order."
            )
        if not self._reuse:
            self._results[number] = _with_values(result, [_cloned(value) for value in self._values])
            if number == self.stop - 1:
                self._leave({role: self._values[self._index[role]] for role in self.template.streams_out})

    def _leave(self, streams: Mapping[str, Any]) -> None:
        """Stores the streams that leave the blocks that may be skipped; the last block of a model may drop a stream."""
        self._left = {role: stream.clone() for role, stream in streams.items() if isinstance(stream, Tensor)}
        for role, stream in self._left.items():
            entered = self._entered[role]
            require(
                stream.shape == entered.shape,
                f"{role} enters {self.blocks[self.fn][0]} with shape {[*entered.shape]} and leaves "
                f"{self.blocks[self.stop - 1][0]} with shape {[*stream.shape]}; choose Fn and Bn so that its shape "
                "does not change",
            )
        self._added = {role: stream - self._entered[role] for role, stream in self._left.items()}

    def _supplied(self) -> dict[str, Tensor]:
        """Returns the streams after the skipped blocks."""
        kinds = self.template.cached
        is_one_size = all(self._entered[role].shape == left.shape for role, left in self._left.items())
        require(is_one_size, "the calls differ in size, and cached values are reused for one size only")
        return {
            role: left if kinds.get(role) == "value" else self._entered[role] + self._added[role]
            for role, left in self._left.items()
        }

    def _skip(self, number: int) -> Any:
        """Returns what a skipped block returned at step 0; the last one returns the streams of this step instead."""
        is_last = number == self.stop - 1 and self._is_passed_unchanged
        new = {self._index[role]: stream for role, stream in self._supplied().items()} if is_last else {}
        return self._again(number, new=new)

    def _again(
        self,
        number: int,
        change: Callable[[Tensor], Tensor] = lambda value: value,
        new: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """Returns what a block returned at the last computed step, with its tensors changed or replaced."""
        result = self._results[number]
        values = [result] if isinstance(result, Tensor) else [*result]
        values = [change(value.clone()) if isinstance(value, Tensor) else value for value in values]
        for index, value in (new or {}).items():
            values[index] = value
        return _with_values(result, values)

    def _compare_probe(self, hidden: Tensor) -> None:
        if not self.fn or hidden.shape != self._start.shape:
            return
        probe = (hidden - self._start).float()
        if self._reuse and self._last_probe is not None and self._last_probe.shape == probe.shape:
            self.moved = float((probe - self._last_probe).abs().mean() / self._last_probe.abs().mean())
        elif not self._reuse:
            self._last_probe = probe


@contextlib.contextmanager
def _called_as(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Replaces every call of one of `blocks`, its hooks included, by `call(block, original, *args, **kwargs)`."""
    try:
        for block in {*blocks}:
            block._compiled_call_impl = functools.partial(call, block, block._call_impl)
        yield
    finally:
        for block in {*blocks}:
            del block._compiled_call_impl  # The attribute of the class, None, is visible again.


def _module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path, which may lead through a plain list."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list | tuple) else getattr(found, part, None)
    require(isinstance(found, nn.Module), f"there is no module at {path}, where the graph shows a block")
    return found  # type: ignore[no-any-return]


def _argument(block: nn.Module, place: Place) -> str:
    names = list(inspect.signature(block.forward).parameters)
    name = names[place] if isinstance(place, int) and place < len(names) else place
    return f"`{name}`"


def _with_values(result: Any, values: list[Any]) -> Any:
    """Returns a result of the same type as `result` that holds other values."""
    if isinstance(result, Tensor):
        return values[0]
    return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [t for part in output for t in tensors_of(part)] if isinstance(output, list | tuple) else []


def require(holds: bool, text: str) -> None:
    if not holds:
        raise UncheckableError(
            f"cachedit_fx: check_pattern cannot check this model: {text}.\n"
            "The template may be right or wrong. What the model must be like: "
            "help(cachedit_fx.testing.check_pattern)"
        )
