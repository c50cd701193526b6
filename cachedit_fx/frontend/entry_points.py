"""Methods of a model that run its blocks, but not by way of `model(...)`: `forward_with_cfg`, `decode`.

A sampler that calls such a method passes the cache by. So the method is watched in the instance, where the cache is
enabled: a call that takes and returns tensors is counted, with a warning.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class WatchedMethod:
    """Stands in a module for one of its methods, and calls it.

    Args:
        told: Is given the module, the method's name and the call to make; returns what that returns.
    """

    def __init__(self, module: nn.Module, name: str, told: Callable[[nn.Module, str, Callable[[], Any]], Any]) -> None:
        functools.update_wrapper(self, getattr(type(module), name))
        self._module, self._name, self._told = module, name, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(getattr(type(self._module), self._name), self._module, *args, **kwargs)
        if torch.compiler.is_compiling() or not has_tensor((args, kwargs)):
            return call()
        return self._told(self._module, self._name, call)

    def __reduce__(self) -> tuple[Any, ...]:
        return WatchedMethod, (self._module, self._name, self._told)  # In a copy of the module, of the copy.


def watch_methods(module: nn.Module, told: Callable[[nn.Module, str, Callable[[], Any]], Any]) -> None:
    """Puts a `WatchedMethod` in the place of every entry point."""
    for name in entry_points(module):
        module.__dict__.setdefault(name, WatchedMethod(module, name, told))


def unwatch_methods(module: nn.Module) -> None:
    """Takes off what `watch_methods` put there."""
    for name in [name for name, value in vars(module).items() if isinstance(value, WatchedMethod)]:
        del module.__dict__[name]


def has_tensor(values: Any) -> bool:
    """Whether there is a tensor among nested values."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(values))


def entry_points(module: nn.Module) -> list[str]:
    """Public methods that reach the forward or a list of blocks, and that the forward itself does not reach."""
    methods = _methods_of(type(module))
    blocks = {name for name, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child) > 1}
    inside = _reached("forward", methods)
    public = (name for name in methods if name[0] != "_" and name not in inside)
    return [name for name in public if not _reached(name, methods).isdisjoint({"forward", *blocks})]


def _methods_of(cls: type) -> dict[str, list[types.FunctionType]]:
    """The methods that the classes of a model define, those of torch aside; by name, the overridden ones too."""
    found: dict[str, list[types.FunctionType]] = {}
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType):
                found.setdefault(name, []).append(value)
    return found


def _reached(name: str, methods: dict[str, list[types.FunctionType]]) -> set[str]:
    """Attributes of the module that a method reads, and those that the methods among them read in turn."""
    found, todo = {name}, [name]
    while todo:
        new = {name for function in methods.get(todo.pop(), ()) for name in _own_names(function)} - found
        found |= new
        todo += new
    return found


@functools.cache
def _own_names(function: types.FunctionType) -> frozenset[str]:
    code = function.__code__
    return frozenset(_read_off(code, code.co_varnames[0])) if code.co_argcount else frozenset()


def _read_off(code: types.CodeType, owner: str) -> Iterator[str]:
    """Attributes that a function, and those that it defines, read off its variable `owner`."""
    before: dis.Instruction | None = None
    for found in dis.get_instructions(code):
        is_loaded = before is not None and before.opname.startswith("LOAD_") and _last(before.argval) == owner
        if is_loaded and found.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield found.argval
        before = found
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and owner in inner.co_freevars:
            yield from _read_off(inner, owner)


def _last(names: Any) -> Any:
    """One instruction may load two variables."""
    return names[-1] if isinstance(names, tuple) and names else names
