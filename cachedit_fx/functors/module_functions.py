"""Replaces functions of Python modules in the code that Dynamo traces."""

from __future__ import annotations

import difflib
import functools
import importlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import ConfigError, cut
from cachedit_fx.forking import released_in_child

_lock = released_in_child(threading.RLock())  # Reentrant, since a model may be deleted while it is held.


@dataclass
class _Replacement:
    """A replaced function of a Python module.

    Attributes:
        function: What traced code calls.
        original: What the module held.
        installed: What the module holds now.
        num_holders: The number of models for which it is replaced.
    """

    function: Callable[..., Any]
    original: Callable[..., Any]
    installed: Callable[..., Any]
    num_holders: int = 0


_replacements: dict[tuple[str, str], _Replacement] = {}  # By the name of the Python module and that of the function.


def replace_module_function(
    transformer: nn.Module, place: str, function: Callable[..., Any]
) -> weakref.finalize[Any, nn.Module]:
    """Replaces a function of a Python module until the returned object is called or `transformer` is deleted.

    If several models replace a function, it is restored after the last of them.

    Args:
        place: As for `PatchFunctor.replace_function`.

    Raises:
        ConfigError: There is no such function, or another model has replaced it by another function.
    """
    module, name = _find(transformer, place)
    key = (module.__name__, name)
    with _lock:
        known = _replacements.get(key)
        if known is None:
            original = getattr(module, name)
            known = _replacements[key] = _Replacement(function, original, _when_traced(function, original))
            setattr(module, name, known.installed)
        elif known.function is not function:
            raise ConfigError(
                f"cachedit_fx: {':'.join(key)} is already replaced for another model, by another function.\n"
                f"  expected: {_name_of(known.function)}, the function that it is replaced by\n"
                f"  found:    {_name_of(function)}\n"
                "What to do: use the same function for all models, or call disable_cache for the other model."
            )
        known.num_holders += 1
        release = weakref.finalize(transformer, _release, module, name)
        release.atexit = False
        return release


def _release(module: ModuleType, name: str) -> None:
    with _lock:
        known = _replacements[module.__name__, name]
        known.num_holders -= 1
        if known.num_holders:
            return
        del _replacements[module.__name__, name]
        if getattr(module, name, None) is known.installed:  # Otherwise something else has replaced it since.
            setattr(module, name, known.original)


def _when_traced(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `function` in code that Dynamo traces, and `original` otherwise."""

    @functools.wraps(original)
    def installed(*args: Any, **kwargs: Any) -> Any:
        # Dynamo traces only one of the two branches.
        return function(*args, **kwargs) if torch.compiler.is_compiling() else original(*args, **kwargs)

    return installed


def _name_of(function: Callable[..., Any]) -> str:
    return cut(getattr(function, "__qualname__", function))


def _find(transformer: nn.Module, place: str) -> tuple[ModuleType, str]:
    path, _, name = place.rpartition(":")
    path = path or type(transformer).__module__
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(
            f"cachedit_fx: a function to replace must be given as 'package.module:function', got {place!r}, and there "
            f"is no module {path!r} ({error})"
        ) from error
    if callable(getattr(module, name, None)):
        return module, name
    functions = [known for known, value in vars(module).items() if callable(value)]
    near = difflib.get_close_matches(name, functions, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"cachedit_fx: the module {path} has no function {name!r} to replace, got {place!r}{hint}")
