"""What stands in a function's frame when it is called, and what lies below it; without running the function.

call          module(x, timestep=t)                               ->  {"self": module, "x": x, "timestep": t}
expression    L['self']._modules['proj']._parameters['weight']    ->  module.proj.weight
"""

from __future__ import annotations

import ast
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cachedit_fx.frontend.dict_versions import DictVersions

Locals = dict[str, Any]
Step = tuple[str, Any]  # "item" and its key, "attribute" and its name, or "call" and the name of a tensor's method.
Path = tuple[Step, ...]

_METHODS = ("size", "stride", "storage_offset")  # What Dynamo calls: a size that may change is an input of its own.


def path_of(source: str) -> Path:
    """The steps of an expression of Dynamo's from a frame's locals `L` or globals `G`, which are the first step.

    Raises:
        ValueError: The expression has anything in it but attributes, constant keys, and methods that give a size.
    """
    steps: list[Step] = []
    try:
        node: ast.expr = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{source} is no expression") from error
    while not isinstance(node, ast.Name):
        match node:
            case ast.Attribute(value=inner, attr=name):
                steps.append(("attribute", name))
            case ast.Subscript(value=inner, slice=key):
                steps.append(("item", ast.literal_eval(key)))
            case ast.Call(func=ast.Attribute(value=inner, attr=name), args=[], keywords=[]) if name in _METHODS:
                steps.append(("call", name))
            case _:
                raise ValueError(f"{source} is more than attributes and keys")
        node = inner
    if node.id not in ("L", "G"):
        raise ValueError(f"{source} begins neither at the locals nor at the globals")
    return (("frame", node.id), *reversed(steps))


class Fetch:
    """Finds values by their paths: a model has hundreds of weights, and they are looked up at every call.

    Most of them lie below the frame's own module, by way of dictionaries alone. As long as none of these was written,
    the last one on every way is where it was. The others are walked to. No value is held here.

    Args:
        paths: As of `path_of`.
        names: The function's globals.
    """

    def __init__(self, paths: Sequence[Path], names: dict[str, Any]) -> None:
        self._paths, self._names = paths, names
        # Of the last call: the ways, what walks to the others, and where each value is among what the two give.
        self._known: tuple[_Ways, _Walk, tuple[int, ...]] | None = None

    def __call__(self, frame: Locals) -> tuple[Any, ...]:
        """The values for a frame, one for each path.

        Raises:
            AttributeError, LookupError: A path leads nowhere.
        """
        known = self._known
        if known is None or not known[0].hold(frame):
            known = self._known = self._look(frame)
        ways, walk, order = known
        found = [*map(operator.getitem, ways.holders, ways.keys), *walk(frame)]
        return tuple(map(found.__getitem__, order))

    def _look(self, frame: Locals) -> tuple[_Ways, _Walk, tuple[int, ...]]:
        ways = _Ways(frame, self._paths)
        others = sorted({*range(len(self._paths))} - {*ways.numbers})
        places = {number: place for place, number in enumerate((*ways.numbers, *others))}
        walk = _Walk([self._paths[i] for i in others], self._names)
        return ways, walk, tuple(map(places.__getitem__, range(len(places))))


class _Ways:
    """Those of the paths that lead from the frame's own module through dictionaries alone.

    Attributes:
        numbers: Of these paths.
        holders, keys: For each of them, the last dictionary and what to read there.
    """

    def __init__(self, frame: Locals, paths: Sequence[Path]) -> None:
        self.numbers: list[int] = []
        self.holders: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        self._first: dict[str, Any] = {}  # The module's own attributes that are passed; others may change at any time.
        passed: list[dict[Any, Any]] = []
        known: dict[Path, Any] = {}
        attributes = _attributes(frame.get("self"))
        for number, path in enumerate(paths):
            if path[:-1] not in known:
                known[path[:-1]] = self._follow(frame, path[:-1], passed)
            holder = _holder(known[path[:-1]], path[-1])
            if holder is not None and holder is not attributes:  # The module's own dictionary holds this, in the end.
                self.numbers.append(number)
                self.holders.append(holder)
                self.keys.append(path[-1][1])
        self._passed = DictVersions(passed)

    def hold(self, frame: Locals) -> bool:
        """Whether they lead where they did."""
        attributes = _attributes(frame.get("self"))
        return all(attributes.get(name) is value for name, value in self._first.items()) and self._passed.are_same()

    def _follow(self, frame: Locals, path: Path, passed: list[dict[Any, Any]]) -> Any:
        """Where a path leads; None where it does not go through dictionaries. Adds those that it passes."""
        if path[:2] != (("frame", "L"), ("item", "self")):
            return None
        value = frame.get("self")
        attributes = _attributes(value)
        for step in path[2:]:
            if step == ("attribute", "__dict__"):
                value = _attributes(value)
                continue
            holder = _holder(value, step)
            if holder is None:
                return None
            value = holder[step[1]]
            if holder is attributes:
                self._first[step[1]] = value
            else:
                passed.append(holder)
        return value


def _attributes(value: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = getattr(value, "__dict__", {})
    return found


def _holder(value: Any, step: Step) -> dict[Any, Any] | None:
    """The dictionary that holds what a step from `value` leads to; None if none does."""
    kind, key = step
    if kind == "item" and type(value) is dict:
        holder = value
    elif kind == "attribute" and not hasattr(type(value), key):
        holder = _attributes(value)
    else:
        return None
    return holder if key in holder else None


class _Walk:
    """Goes all the way. What several paths have in common is looked up once, and what lies side by side in one go."""

    def __init__(self, paths: Sequence[Path], names: dict[str, Any]) -> None:
        self._names = names
        # What to get, out of which value, and whether that is a tuple of several.
        self._program: list[tuple[Callable[[Any], Any], int, bool]] = []
        below: dict[Path, dict[str, dict[Any, None]]] = {}  # Path -> kind of step -> keys that are asked for there.
        for path in paths:
            for i in range(1, len(path)):
                below.setdefault(path[:i], {}).setdefault(path[i][0], {})[path[i][1]] = None
        places: dict[Path, int] = {(("frame", "L"),): 0, (("frame", "G"),): 1}
        count, waiting = 2, [*places]
        for path in waiting:
            for kind, keys in below.get(path, {}).items():
                for get in _getters(kind, [*keys]):
                    self._program.append((get, places[path], kind != "call" and len(keys) > 1))
                places |= {(*path, (kind, key)): count + i for i, key in enumerate(keys)}
                count += len(keys)
                waiting += [(*path, (kind, key)) for key in keys]
        self._picked = [places[path] for path in paths]

    def __call__(self, frame: Locals) -> Iterable[Any]:
        values: list[Any] = [frame, self._names]
        append = values.append
        for get, at, is_many in self._program:
            if is_many:
                values += get(values[at])
            else:
                append(get(values[at]))
        return map(values.__getitem__, self._picked)


def _getters(kind: str, keys: list[Any]) -> list[Callable[[Any], Any]]:
    """What gets these of a value, in their order: all at once, as a tuple if they are several, but for methods."""
    if kind == "call":
        return [operator.methodcaller(key) for key in keys]
    return [operator.itemgetter(*keys) if kind == "item" else operator.attrgetter(*keys)]


class Binder:
    """Makes of a call's arguments the locals that the function's frame begins with.

    Args:
        function: A Python function. Its defaults are taken as they are now.

    Raises:
        ValueError: It has parameters that are positional only.
    """

    def __init__(self, function: types.FunctionType) -> None:
        code = function.__code__
        if code.co_posonlyargcount:
            raise ValueError(f"{function.__qualname__} has parameters that are positional only")
        count = code.co_argcount + code.co_kwonlyargcount
        names, rest = code.co_varnames[:count], iter(code.co_varnames[count:])
        self._positional = names[: code.co_argcount]
        self._names = frozenset(names)
        self._more = next(rest) if code.co_flags & inspect.CO_VARARGS else None
        self._others = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None
        defaults = function.__defaults__ or ()
        first = code.co_argcount - len(defaults)
        self._defaults = {
            **dict(zip(self._positional[first:], defaults, strict=True)),
            **(function.__kwdefaults__ or {}),
        }
        self._cells = tuple(zip(code.co_freevars, function.__closure__ or (), strict=True))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Locals | None:
        """The locals; None where the function would raise a TypeError for its arguments."""
        given = dict(zip(self._positional, args, strict=False))
        others = None
        if self._others is not None:
            others = {name: value for name, value in kwargs.items() if name not in self._names}
            kwargs = {name: value for name, value in kwargs.items() if name in self._names} if self._names else {}
        if not kwargs.keys().isdisjoint(given) or (self._more is None and len(args) > len(self._positional)):
            return None
        frame = {**self._defaults, **given, **kwargs}
        if frame.keys() != self._names:
            return None
        if self._more is not None:
            frame[self._more] = args[len(self._positional) :]
        if self._others is not None:
            frame[self._others] = others
        for name, cell in self._cells:
            frame[name] = cell.cell_contents
        return frame
