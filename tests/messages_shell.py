"""The messages of `cachedit-fx`, in the form of `messages_table.py`."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from cachedit_fx.shell.command_arguments import fields_of
from cachedit_fx.shell.user_code import arguments_of, make
from tests.messages_table import Row

FACTORIES = """\
ONE = 1

def number():
    return ONE

def broken():
    return ONE / 0
"""


def of_factory(name: str, value: str, says: str, factory: str) -> Row:
    def provoke(folder: Path) -> None:
        (folder / "made_up.py").write_text(FACTORIES, encoding="utf-8")
        (folder / "imports_gone.py").write_text("import no_such_package\n", encoding="utf-8")
        with patch("sys.path", [str(folder)]), patch.dict("sys.modules"):
            make(factory)

    return Row(name, provoke, value, says)


ROWS = [
    of_factory("factory", "got 'made_up'", "must be module:function or path.py:function", "made_up"),
    of_factory("factory-module", "'gone'", "which was not found", "gone:f"),
    of_factory("factory-function", "'gone'", "'made_up' does not have", "made_up:gone"),
    of_factory("factory-no-function", "got 'ONE'", "must name a function", "made_up:ONE"),
    of_factory("factory-return", "got int", "must return (target, kwargs), (target, args), (target", "made_up:number"),
    of_factory(
        "factory-raises",
        "the factory 'made_up:broken' raised ZeroDivisionError: division by zero",
        "  at: `broken` in made_up.py:7\nWhat to do: ",
        "made_up:broken",
    ),
    of_factory(
        "factory-import",
        "the import of 'imports_gone' raised ModuleNotFoundError: No module named 'no_such_package'",
        "  at: `<module>` in imports_gone.py:1\nWhat to do: ",
        "imports_gone:f",
    ),
    Row("shell-function", lambda _: arguments_of(print), "is a function", "explain needs the arguments of a call"),
    Row("shell-option", lambda _: fields_of(["Fn"]), "got 'Fn'", "must be NAME=VALUE"),
]
