"""Finds the inputs of a graph without Dynamo: the local variables of a call, and the values that expressions find.

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
from cachedit_fx.frontend.torch_internals import Locals

Step = tuple[str, Any]  # "item" and a key, "attribute" and a name, or "call" and the name of a method of a tensor.
Path = tuple[Step, ...]

_METHODS = ("size", "stride", "storage_offset")  # Dynamic sizes are inputs of their own, found by these calls.


def path_of(source: str) -> Path:
    """The steps of one of Dynamo's expressions. The first step is the locals `L` or globals `G` of a frame.

    Raises:
        ValueError: The expression contains something other than attributes, constant keys, and methods that return
            sizes.
    """
    steps: list[Step] = []
    try:
        node: ast.expr = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{source} is not an expression") from error
    while not isinstance(node, ast.Name):
        match node:
            case ast.Attribute(value=inner, attr=name):
                steps.append(("attribute", name))
            case ast.Subscript(value=inner, slice=key):
                steps.append(("item", ast.literal_eval(key)))
            case ast.Call(func=ast.Attribute(value=inner, attr=name), args=[], keywords=[]) if name in _METHODS:
                steps.append(("call", name))
            case _:
                raise ValueError(f"{source} contains more than attributes and keys")
        node = inner
    if node.id not in ("L", "G"):
        raise ValueError(f"{source} begins with neither the locals nor the globals")
    return (("frame", node.id), *reversed(steps))


class Fetch:
    """Finds the values at some paths. It is fast for hundreds of weights, since it runs at every call.

    Most weights are reached from the module of the frame through dictionaries only. While none of these dictionaries
    has been written to, the last dictionary of each path is the same, and the value is read from it directly. For other
    paths, all steps are made. No value is stored here.

    Args:
        paths: See `path_of`.
        names: The globals of the function.
    """

    def __init__(self, paths: Sequence[Path], names: dict[str, Any]) -> None:
        self._paths, self._names = paths, names
        # From the last call: the paths through dictionaries, the others, and the position of each path's value in the
        # values of both.
        self._plan: tuple[_DictPaths, _Walk, tuple[int, ...]] | None = None

    def __call__(self, frame: Locals) -> tuple[Any, ...]:
        """One value per path.

        Raises:
            AttributeError, LookupError: There is no value at a path.
        """
        plan = self._plan
        if plan is None or not plan[0].are_valid(frame):
            plan = self._plan = self._make_plan(frame)
        dict_paths, walk, order = plan
        found = [*map(operator.getitem, dict_paths.holders, dict_paths.keys), *walk(frame)]
        return tuple(map(found.__getitem__, order))

    def _make_plan(self, frame: Locals) -> tuple[_DictPaths, _Walk, tuple[int, ...]]:
        dict_paths = _DictPaths(frame, self._paths)
        others = sorted({*range(len(self._paths))} - {*dict_paths.numbers})
        places = {number: place for place, number in enumerate((*dict_paths.numbers, *others))}
        walk = _Walk([self._paths[i] for i in others], self._names)
        return dict_paths, walk, tuple(map(places.__getitem__, range(len(places))))


class _DictPaths:
    """Those of some paths that lead from the module of the frame through dictionaries only.

    Attributes:
        numbers: The positions of these paths among all.
        holders, keys: For each of these paths, the last dictionary and the key in it.
    """

    def __init__(self, frame: Locals, paths: Sequence[Path]) -> None:
        self.numbers: list[int] = []
        self.holders: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        # The attributes of the module through which the paths lead. Its dictionary as a whole may change at any time.
        self._first: dict[str, Any] = {}
        passed: list[dict[Any, Any]] = []
        known: dict[Path, Any] = {}
        attributes = _attributes(frame.get("self"))
        for number, path in enumerate(paths):
            if path[:-1] not in known:
                known[path[:-1]] = self._follow(frame, path[:-1], passed)
            holder = _holder(known[path[:-1]], path[-1])
            if holder is not None and holder is not attributes:  # The walk reads the attributes of the module itself.
                self.numbers.append(number)
                self.holders.append(holder)
                self.keys.append(path[-1][1])
        self._passed = DictVersions(passed)

    def are_valid(self, frame: Locals) -> bool:
        """Whether `holders` are still the last dictionaries of the paths."""
        attributes = _attributes(frame.get("self"))
        return all(attributes.get(name) is value for name, value in self._first.items()) and self._passed.are_same()

    def _follow(self, frame: Locals, path: Path, passed: list[dict[Any, Any]]) -> Any:
        """The value at a path; None if the path leads through something other than dictionaries.

        Adds the dictionaries on the path to `passed`.
        """
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
    """The dictionary that a step from `value` reads from; None if it reads from no dictionary."""
    kind, key = step
    if kind == "item" and type(value) is dict:
        holder = value
    elif kind == "attribute" and not hasattr(type(value), key):
        holder = _attributes(value)
    else:
        return None
    return holder if key in holder else None


class _Walk:
    """Makes all steps of some paths: common beginnings once, and the items or attributes of one value in one call."""

    def __init__(self, paths: Sequence[Path], names: dict[str, Any]) -> None:
        self._names = names
        # A getter, the position of the value that it is called with, and whether it returns a tuple of several values.
        self._program: list[tuple[Callable[[Any], Any], int, bool]] = []
        below: dict[Path, dict[str, dict[Any, None]]] = {}  # Path -> kind of step -> keys to read.
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
    """Functions that read the keys from a value: one for all items or attributes, and one for each method call."""
    if kind == "call":
        return [operator.methodcaller(key) for key in keys]
    return [operator.itemgetter(*keys) if kind == "item" else operator.attrgetter(*keys)]


class Binder:
    """Makes the local variables with which the frame of a function begins from the arguments of a call.

    Args:
        function: A Python function. Its present default values are used.

    Raises:
        ValueError: It has positional-only parameters.
    """

    def __init__(self, function: types.FunctionType) -> None:
        code = function.__code__
        if code.co_posonlyargcount:
            raise ValueError(f"{function.__qualname__} has positional-only parameters")
        count = code.co_argcount + code.co_kwonlyargcount
        names, rest = code.co_varnames[:count], iter(code.co_varnames[count:])
        self._positional = names[: code.co_argcount]
        self._names = frozenset(names)
        self._var_args = next(rest) if code.co_flags & inspect.CO_VARARGS else None
        self._var_kwargs = next(rest) if code.co_flags & inspect.CO_VARKEYWORDS else None
        defaults = function.__defaults__ or ()
        first = code.co_argcount - len(defaults)
        self._defaults = {
            **dict(zip(self._positional[first:], defaults, strict=True)),
            **(function.__kwdefaults__ or {}),
        }
        self._cells = tuple(zip(code.co_freevars, function.__closure__ or (), strict=True))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Locals | None:
        """The local variables; None if the function would raise a TypeError for the arguments."""
        given = dict(zip(self._positional, args, strict=False))
        others = None
        if self._var_kwargs is not None:
            others = {name: value for name, value in kwargs.items() if name not in self._names}
            kwargs = {name: value for name, value in kwargs.items() if name in self._names} if self._names else {}
        if not kwargs.keys().isdisjoint(given) or (self._var_args is None and len(args) > len(self._positional)):
            return None
        frame = {**self._defaults, **given, **kwargs}
        if frame.keys() != self._names:
            return None
        if self._var_args is not None:
            frame[self._var_args] = args[len(self._positional) :]
        if self._var_kwargs is not None:
            frame[self._var_kwargs] = others
        for name, cell in self._cells:
            frame[name] = cell.cell_contents
        return frame
