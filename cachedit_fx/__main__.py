"""`python -m cachedit_fx explain module:factory` runs `explain` from the shell; `options` lists the options.

The factory is a function without parameters. It returns `(target, inputs)`: a transformer or a pipeline, and the
arguments of one call as a dict (keyword arguments) or a tuple (positional arguments). A call with both kinds is
returned as `(target, args, kwargs)`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachedit_fx.config.cache_config import CacheConfig, split_options
from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.reference import options_table, options_text
from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.explanation.result import GRAPHS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    The status is 0 if every transformer is cached, 1 if one of them is not, and 2 if the arguments are wrong.
    """
    given = _parser().parse_args(argv)
    if given.command == "options":
        print(options_table(OPTIONS) if given.markdown else options_text(OPTIONS))
        return 0
    return _explain(given)


def _explain(given: argparse.Namespace) -> int:
    try:
        target, args, kwargs = _make(given.factory)
        explanation = explain(target, *args, cache_config=_config(given.option), **kwargs)
        if given.graph:
            explanation.graph(given.graph).print_readable()
        elif given.diff is not None:
            print(explanation.diff(expand=True if given.diff == ["all"] else given.diff))
        else:
            print(explanation)
        if given.json:
            given.json.write_text(json.dumps(explanation.to_dict(), indent=1) + "\n", encoding="utf-8")
        if given.html:
            print(f"wrote {explanation.to_html(given.html)}", file=sys.stderr)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if explanation.is_cached else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cachedit_fx", description="Caching for compiled transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    options = commands.add_parser("options", help="every option: its default, what is allowed, what it means")
    options.add_argument("--markdown", action="store_true", help="as the table of the README")
    command = commands.add_parser(
        "explain",
        help="show what the compiler does with a model, and why",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("factory", help="module:function, or path.py:function")
    command.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a field of CacheConfig; can be given several times",
    )
    command.add_argument("--graph", choices=GRAPHS, help="print this graph instead of the explanation")
    command.add_argument(
        "--diff",
        nargs="*",
        metavar="BLOCK",
        help="print the diff between the graphs before and after the rewrite; expand these blocks, or 'all'",
    )
    command.add_argument("--html", type=Path, metavar="PATH", help="write the explanation as an HTML page")
    command.add_argument("--json", type=Path, metavar="PATH", help="write the explanation as JSON")
    return parser


def _make(factory: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Calls the factory and returns its target, args and kwargs.

    Raises:
        ConfigError: There is no such factory, or its result has none of the three forms.
    """
    module_name, colon, name = factory.rpartition(":")
    if not colon or not name:
        raise ConfigError(f"cachedit_fx: factory must be module:function or path.py:function, got {factory!r}")
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        sys.path.insert(0, str(path.parent))
        module_name = path.stem
    else:
        sys.path.insert(0, "")  # Modules of the current folder are found, as with `python -m`.
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module itself exists; one of its own imports is missing.
        raise ConfigError(
            f"cachedit_fx: factory names the module {module_name!r}, which was not found in the current folder or "
            "among the installed packages"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"cachedit_fx: factory names {name!r}, which {module_name!r} does not have; pass the name of a function "
            "of that module"
        ) from error
    result = found()
    match result:
        case (target, dict() as kwargs):
            return target, (), kwargs
        case (target, tuple() | list() as args):
            return target, tuple(args), {}
        case (target, tuple() | list() as args, dict() as kwargs):
            return target, tuple(args), kwargs
    raise ConfigError(
        f"cachedit_fx: {factory} must return (target, kwargs), (target, args) or (target, args, kwargs), "
        f"got {type(result).__name__}"
    )


def _config(options: Sequence[str]) -> CacheConfig | None:
    """Builds a configuration from options such as `["Fn_compute_blocks=1"]`; None if there are no options.

    Raises:
        ConfigError: An option is unknown, or its value is not allowed.
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
    return split_options(fields)[0] if fields else None


if __name__ == "__main__":
    sys.exit(main())
