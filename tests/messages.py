"""The text of a message without its line breaks, and the places in the package where messages are made."""

from __future__ import annotations

import ast
import functools
import logging
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.exc import BackendCompilerFailed

ROOT = Path(__file__).parents[1]
NOT_SHOWN = ("UnknownError",)  # Why a block is traced and not repeated: the result is the same.
FOLDERS = tuple(ROOT / name for name in ("cachedit_fx", "passes", "patterns"))


def flat(message: str) -> str:
    """The lines of a mismatch joined into one: `stream-count: expected: 2 ...; found: 1 ...; at: ...`."""
    message = re.sub(r"\n +line: .*", "", message)
    for name, before in (("expected", " expected: "), ("found", "; found: "), ("at", "; at: ")):
        message = re.sub(rf"\n +{name}: +", before, message)
    return message


@dataclass(frozen=True)
class Site:
    """A place in the source that raises an error with a text or logs a warning."""

    file: str
    function: str
    kind: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first} {self.function}: {self.kind}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.function, self.kind


@functools.cache
def sites() -> tuple[Site, ...]:
    """All sites except errors without a text (bugs of the package, signals, errors that are raised again),
    `MismatchError` and `NOT_SHOWN`, which never reach a user."""
    files = sorted({path.resolve() for folder in FOLDERS for path in folder.rglob("*.py")})
    return tuple(site for file in files for site in _in_node(file, ast.parse(file.read_text(encoding="utf-8")), ()))


def _in_node(file: Path, node: ast.AST, names: tuple[str, ...]) -> Iterator[Site]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        names = (*names, node.name)
    if kind := _kind(node):
        yield Site(str(file.relative_to(ROOT)), ".".join(names), kind, node.lineno, node.end_lineno)
    for child in ast.iter_child_nodes(node):
        yield from _in_node(file, child, names)


def _kind(node: ast.AST) -> str:
    match node:
        case ast.Raise(exc=ast.Call(func=ast.Name(id=name))):
            return "" if name in NOT_SHOWN or "mismatch" in name.lower() else name
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logger"), attr="warning" | "error")):
            return "warning"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn")):
            return "warning"
    return ""


@dataclass(frozen=True)
class Told:
    """A message as the user sees it, and the site that made it."""

    text: str
    shown: str  # The text with what torch.compile adds around it.
    site: Site | None


def told_by(provoke: Callable[[Path], object]) -> Told:
    """The error that `provoke` raises, or else the warning that it logs. It receives a new temporary folder."""
    torch._dynamo.reset()
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = found.append
    logger = logging.getLogger("cachedit_fx")
    logger.addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            provoke(Path(folder))
    except Exception as error:
        inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        frames = [*traceback.extract_tb(inner.__traceback__)]
        ours = [(Path(f.filename).resolve(), f.lineno) for f in frames if _is_ours(f.filename)]
        return Told(str(inner), str(error), _site_at(*ours[-1]) if ours else None)
    finally:
        logger.removeHandler(handler)
    (record,) = found
    return Told(record.getMessage(), record.getMessage(), _site_at(Path(record.pathname).resolve(), record.lineno))


def _is_ours(filename: str) -> bool:
    return any(Path(filename).resolve().is_relative_to(folder) for folder in FOLDERS)


def _site_at(file: Path, line: int | None) -> Site | None:
    name = str(file.relative_to(ROOT))
    return next((site for site in sites() if site.file == name and site.first <= (line or 0) <= site.last), None)
