"""The arguments that several commands have, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachedit_fx.config.cache_config import split_options
from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations.config_files import load_configs

STDOUT = Path("-")
FACTORY = """\
The factory is a function without parameters, as module:function or
path.py:function. It returns a transformer or a pipeline, and how to call it:
"""


def add_factory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help="module:function or path.py:function")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("-o", "--option"),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set an option; may be repeated",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="read the options from a YAML or JSON file")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        type=writable,
        metavar="PATH",
        help="write JSON to PATH, or print JSON instead of text",
    )


def add_output(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    """Adds an argument with the path of a file to write."""
    parser.add_argument(flag, type=writable, metavar="PATH", help=text)


def writable(text: str) -> Path:
    """A path to write to. It is checked before a long run, not after it.

    Raises:
        ArgumentTypeError: There is no such folder, or the path is a folder.
    """
    path = Path(text)
    if path == STDOUT or (path.parent.is_dir() and not path.is_dir()):
        return path
    found = "is a folder" if path.is_dir() else f"is in a folder that does not exist ({path.parent})"
    raise argparse.ArgumentTypeError(f"{text!r} {found}; pass the path of a file to write")


def configuration(given: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `enable_cache` that `--config` and `--option` stand for; none if neither was given.

    Raises:
        ConfigError: An option is unknown, its value is not allowed, or the file cannot be read.
    """
    found = {} if given.config is None else load_configs(given.config)
    fields = fields_of(given.option)
    if fields:
        found["cache_config"], inductor = split_options(fields, found.get("cache_config"))
        found |= {"options": inductor} if inductor else {}
    return found


def fields_of(options: Sequence[str]) -> dict[str, Any]:
    """Parses options such as `["Fn_compute_blocks=1"]`; the values are JSON, or words.

    Raises:
        ConfigError: An option has no value.
    """
    fields: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"cachedit_fx: option must be NAME=VALUE, got {option!r}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:  # A word needs no quotes, and True, False and None may be spelled as in Python.
            fields[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return fields


@contextlib.contextmanager
def json_alone(given: argparse.Namespace) -> Iterator[None]:
    """If JSON is printed, sends what the user's code prints to stderr, so that stdout holds JSON only."""
    if given.json != STDOUT:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_result(given: argparse.Namespace, text: str, data: Any) -> None:
    """Prints a result as text or, with `--json`, prints or writes it as JSON."""
    if given.json == STDOUT:
        text = json.dumps(data, indent=1)
    print(text)
    if given.json not in (None, STDOUT):
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        wrote(given.json)


def wrote(path: Path) -> None:
    print(f"wrote {path}", file=sys.stderr)
