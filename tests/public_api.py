"""The public names of the package with their signatures, as text. `tests/public_api.txt` holds the agreed ones.

    python -m tests.public_api            # shows what has changed
    python -m tests.public_api --write    # agrees to it

Public are the names in `__all__` of `cachedit_fx` and of the modules of `MODULES`, and of their classes the methods,
properties and dataclass fields whose names do not begin with an underscore.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("public_api.txt")
PACKAGE = "cachedit_fx"
TOPICS = (
    *("config", "errors", "exporting", "forecasters", "functors", "inspect", "integrations", "integrations.comfyui"),
    *("patterns", "policies", "saving", "testing", "tuning"),
)
MODULES = (PACKAGE, *(f"{PACKAGE}.{topic}" for topic in TOPICS))


def public_api() -> str:
    """The text for the present code. Nothing in it depends on the version of Python or of a dependency."""
    known: dict[int, str] = {}
    lines = []
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"[{name}]", *_module_lines(module, known), ""]
    moved = importlib.import_module(PACKAGE)._MOVED
    lines.append("[deprecated]")
    lines += sorted(f"{PACKAGE}.{name} -> {PACKAGE}.{topic}.{name}" for topic, names in moved.items() for name in names)
    return "\n".join(lines) + "\n"


def difference(agreed: str, found: str) -> str:
    """What was removed (-) and added (+), with the lines around it; empty if nothing was."""
    lines = difflib.unified_diff(agreed.splitlines(), found.splitlines(), "agreed", "found", lineterm="", n=2)
    return "\n".join(lines)


def _module_lines(module: Any, known: dict[int, str]) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        elsewhere = known.setdefault(id(value), f"{module.__name__}.{name}")
        if elsewhere != f"{module.__name__}.{name}":
            yield f"{name} = {elsewhere}"
        elif inspect.isclass(value):
            yield from class_lines(value)
        elif callable(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: {type(value).__name__}"


def class_lines(cls: type) -> Iterator[str]:
    """The class with its public bases, then its public members. What it inherits from a public class is left out."""
    bases = [base for base in cls.__bases__ if base is not object]
    public = [base for base in cls.__mro__[1:] if _is_exported(base)]
    inherited = {base for one in public for base in one.__mro__}
    own = [base for base in cls.__mro__ if base not in inherited and base.__module__.startswith((PACKAGE, "tests."))]
    names = [base.__name__ for base in bases if base in public or not base.__module__.startswith(PACKAGE)]
    yield f"class {cls.__name__}({', '.join(names)})" if names else f"class {cls.__name__}"
    if issubclass(cls, enum.Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in cls)
        return
    if dataclasses.is_dataclass(cls):
        yield from _field_lines(cls, own)
    elif fields := getattr(cls, "_fields", ()):  # A named tuple.
        yield from (f"    {name}: {_annotation(cls.__annotations__[name])}" for name in fields)
    elif any("__init__" in vars(base) for base in own) and not getattr(cls, "_is_protocol", False):
        yield f"    __init__{_signature(cls.__init__)}"
    members = {name: value for base in reversed(own) for name, value in vars(base).items()}
    fields = getattr(cls, "__dataclass_fields__", {})
    for name, value in sorted(members.items()):
        if (not name.startswith("_") or name == "__call__") and name not in fields:
            yield from _member_lines(name, value)


def _is_exported(cls: type) -> bool:
    modules = (importlib.import_module(name) for name in MODULES if cls.__module__.startswith(PACKAGE))
    return any(vars(module).get(cls.__name__) is cls and cls.__name__ in module.__all__ for module in modules)


def _field_lines(cls: type, own: list[type]) -> Iterator[str]:
    mine = {name for base in own for name in vars(base).get("__annotations__", {})}
    for field in dataclasses.fields(cls):
        if field.name in mine and not field.name.startswith("_"):
            yield f"    {field.name}: {_annotation(field.type)}{_default_of(field)}"


def _default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_shown(field.default)}"
    return " = ..." if field.default_factory is not dataclasses.MISSING else ""


def _member_lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, property):
        yield f"    {name}: property -> {_annotation(inspect.signature(value.fget).return_annotation)}"
    elif isinstance(value, staticmethod | classmethod):
        yield f"    {type(value).__name__} {name}{_signature(value.__func__)}"
    elif inspect.isfunction(value):
        yield f"    {name}{_signature(value)}"


def _signature(function: Callable[..., Any]) -> str:
    """The signature without quotation marks around the annotations."""
    signature = inspect.signature(function)
    parts, has_star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            has_star = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            parts.append("*")
            has_star = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotated = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_shown(parameter.default)}"
        parts.append(f"{star}{parameter.name}{annotated}{default}")
    returned = signature.return_annotation
    end = "" if returned is inspect.Signature.empty else f" -> {_annotation(returned)}"
    return f"({', '.join(parts)}){end}"


def _annotation(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)  # Of a field of a named tuple.
    return text if isinstance(text, str) else getattr(text, "__name__", str(text))


def _shown(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.public_api", description="Compares the public names.")
    parser.add_argument("--write", action="store_true", help=f"write them to tests/{FILE.name}")
    found = public_api()
    if parser.parse_args(arguments).write:
        FILE.write_text(found, encoding="utf-8")
        return 0
    changes = difference(FILE.read_text(encoding="utf-8"), found)
    print(changes or f"tests/{FILE.name} is up to date")
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
