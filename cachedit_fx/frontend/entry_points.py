"""Methods that run the blocks of a model without `model(...)`, such as `forward_with_cfg` or `decode`.

A sampler that calls such a method bypasses the cache. Therefore `enable_cache` watches these methods in the instance:
a call that takes and returns tensors is counted, and there is a warning.
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

OnCall = Callable[[nn.Module, str, Callable[[], Any]], Any]


class WatchedMethod:
    """Replaces a method in an instance of a module, and calls the method.

    Args:
        on_call: Called with the module, the name of the method, and the call to make. Returns what the call returns.
        takes_tensors: Whether `on_call` is called only if there is a tensor among the arguments.
    """

    def __init__(self, module: nn.Module, name: str, on_call: OnCall, takes_tensors: bool = True) -> None:
        functools.update_wrapper(self, getattr(type(module), name))
        self._module, self._name, self._on_call, self._takes_tensors = module, name, on_call, takes_tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(getattr(type(self._module), self._name), self._module, *args, **kwargs)
        if torch.compiler.is_compiling() or (self._takes_tensors and not has_tensor((args, kwargs))):
            return call()
        return self._on_call(self._module, self._name, call)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module is watched too.
        return WatchedMethod, (self._module, self._name, self._on_call, self._takes_tensors)


def watch_methods(module: nn.Module, on_call: OnCall) -> None:
    """Replaces every entry point of a module by a `WatchedMethod`."""
    for name in entry_points(module):
        module.__dict__.setdefault(name, WatchedMethod(module, name, on_call))


def unwatch_methods(module: nn.Module) -> None:
    """Removes every `WatchedMethod` from a module."""
    for name in [name for name, value in vars(module).items() if isinstance(value, WatchedMethod)]:
        del module.__dict__[name]


def has_tensor(values: Any) -> bool:
    """Whether nested values contain a tensor."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(values))


def entry_points(module: nn.Module) -> list[str]:
    """The public methods that reach the forward or a list of blocks, and that the forward does not reach."""
    methods = _methods_of(type(module))
    blocks = {name for name, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child) > 1}
    of_forward = _reached("forward", methods)
    public = (name for name in methods if name[0] != "_" and name not in of_forward)
    return [name for name in public if not _reached(name, methods).isdisjoint({"forward", *blocks})]


def _methods_of(cls: type) -> dict[str, list[types.FunctionType]]:
    """The methods that the classes of a model define, without those of torch; by name, including overridden ones."""
    found: dict[str, list[types.FunctionType]] = {}
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType):
                found.setdefault(name, []).append(value)
    return found


def _reached(name: str, methods: dict[str, list[types.FunctionType]]) -> set[str]:
    """The attributes of the module that a method reads, directly or through the methods among them."""
    found, todo = {name}, [name]
    while todo:
        new = {name for function in methods.get(todo.pop(), ()) for name in _attributes_of_self(function)} - found
        found |= new
        todo += new
    return found


@functools.cache
def _attributes_of_self(function: types.FunctionType) -> frozenset[str]:
    code = function.__code__
    return frozenset(_attributes_read(code, code.co_varnames[0])) if code.co_argcount else frozenset()


def _attributes_read(code: types.CodeType, owner: str) -> Iterator[str]:
    """The attributes of its variable `owner` that a function, or a function that it defines, reads."""
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        is_loaded = before is not None and before.opname.startswith("LOAD_") and _last(before.argval) == owner
        if is_loaded and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
        before = instruction
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and owner in inner.co_freevars:
            yield from _attributes_read(inner, owner)


def _last(names: Any) -> Any:
    """The name that an instruction loads last. One instruction may load two variables."""
    return names[-1] if isinstance(names, tuple) and names else names
