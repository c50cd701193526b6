"""Makes the model that a command is about, by calling the user's factory, and reports what the user's code raises."""

from __future__ import annotations

import contextlib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachedit_fx.errors import ConfigError, NoMatchError, PassError, PatternError, cut, did_you_mean
from cachedit_fx.integrations.block_adapter import BlockAdapter

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})
_PYTHON = Path(contextlib.__file__).resolve().parent  # It may contain the libraries.
_HIDDEN = (_PACKAGE, Path(torch.__file__).resolve().parent)
_FORMS = "(target, kwargs), (target, args), (target, args, kwargs) or (pipeline, [kwargs, ...])"


@dataclass(frozen=True)
class Made:
    """What a factory returned.

    Attributes:
        target: A transformer, a pipeline or a `BlockAdapter`.
        calls: One entry per call: a dict of keyword arguments, a tuple `(args, kwargs)`, or a function of `target`.
    """

    target: Any
    calls: list[Any]

    def run(self) -> None:
        """Makes all calls without gradients, and drops what they return."""
        pipe = self.target
        if isinstance(pipe, BlockAdapter):
            pipe = next(iter(pipe.transformers().values())) if pipe.pipe is None else pipe.pipe
        with torch.no_grad():
            for call in self.calls:
                if callable(call):
                    call(pipe)
                else:
                    args, kwargs = arguments_of(call)
                    pipe(*args, **kwargs)


def arguments_of(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of a call.

    Raises:
        ConfigError: The call is a function, whose arguments are not known.
    """
    if callable(call):
        raise ConfigError(
            "cachedit_fx: explain needs the arguments of a call, and the first call of the factory is a function; "
            f"return {_FORMS}"
        )
    return ((), dict(call)) if isinstance(call, Mapping) else call


def make(factory: str) -> Made:
    """Calls a factory: `module:function` or `path.py:function`, a function without parameters.

    Raises:
        ConfigError: There is no such factory, it raises an exception, or its result has none of the forms.
    """
    module_name, colon, name = factory.rpartition(":")
    if not colon or not name:
        raise ConfigError(f"cachedit_fx: factory must be module:function or path.py:function, got {factory!r}")
    function = _find(module_name, name)
    with errors_reported(f"the factory {factory!r}"):
        result = function()
    return _made(factory, result)


def _find(module_name: str, name: str) -> Any:
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        sys.path.insert(0, str(path.parent))
        module_name = path.stem
    else:
        sys.path.insert(0, "")  # Modules of the current folder are found, as with `python -m`.
    try:
        with errors_reported(f"the import of {module_name!r}", but=ModuleNotFoundError):
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise _reported(f"the import of {module_name!r}", error) from error
        raise ConfigError(
            f"cachedit_fx: factory names the module {module_name!r}, which was not found in the current folder or "
            "among the installed packages; give the path of its file, as in path.py:function"
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigError(
            f"cachedit_fx: factory names {name!r}, which {module_name!r} does not have; pass the name of a function "
            f"of that module.{did_you_mean(name, dir(importlib.import_module(module_name)))}"
        ) from error
    if not callable(found):
        raise ConfigError(f"cachedit_fx: factory must name a function, got {name!r}, which is {cut(repr(found))}")
    return found


def _made(factory: str, result: Any) -> Made:
    if hasattr(result, "pipe") and isinstance(getattr(result, "calls", None), list):
        return Made(result.pipe, result.calls)
    match result:
        case (target, dict() as kwargs):
            return Made(target, [kwargs])
        case (target, list() as calls) if calls and all(isinstance(call, dict) or callable(call) for call in calls):
            return Made(target, calls)
        case (target, tuple() | list() as args):
            return Made(target, [(tuple(args), {})])
        case (target, tuple() | list() as args, dict() as kwargs):
            return Made(target, [(tuple(args), kwargs)])
    raise ConfigError(f"cachedit_fx: {factory} must return {_FORMS}, got {type(result).__name__}")


@contextlib.contextmanager
def errors_reported(what: str, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Reports an exception of the user's code, or of what it called, as an error of usage.

    Args:
        what: What ran the code, for the message.
        but: Exceptions that pass.

    Raises:
        ConfigError: Such an exception was raised. Errors of this package pass, and so does a bug of it.
    """
    try:
        yield
    except Exception as error:
        if is_ours(error) or isinstance(error, (PassError, *(but if isinstance(but, tuple) else (but,)))):
            raise
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().is_relative_to(_PACKAGE):
            raise
        raise _reported(what, error) from error


def is_ours(error: BaseException) -> bool:
    """Whether this package reports something to the user by this error."""
    return isinstance(error, ConfigError | NoMatchError | PatternError) or str(error).startswith("cachedit_fx: ")


def _reported(what: str, error: Exception) -> ConfigError:
    lines = (
        f"cachedit_fx: {what} raised {type(error).__name__}: {cut(error, 160)}",
        *(f"  at: {place}" for place in _places(error)[-1:]),
        "What to do: correct this. --traceback shows the whole traceback.",
    )
    return ConfigError("\n".join(lines))


def _places(error: Exception) -> list[str]:
    """The lines of the user's code that the error passed through; those of other libraries if there are none."""
    frames = [(Path(frame.filename).resolve(), frame) for frame in traceback.extract_tb(error.__traceback__)]
    in_libraries = [found for found in frames if _is_in(found[0], _LIBRARIES) and not _is_in(found[0], _HIDDEN)]
    own = [found for found in frames if found[0].is_file() and not _is_in(found[0], (*_LIBRARIES, *_HIDDEN, _PYTHON))]
    return [f"`{frame.name}` in {path.name}:{frame.lineno}" for path, frame in own or in_libraries]


def _is_in(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
