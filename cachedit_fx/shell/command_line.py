"""The command line of `cachedit-fx` and `python -m cachedit_fx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from cachedit_fx import _version
from cachedit_fx.errors import ConfigError, NoMatchError, PatternError
from cachedit_fx.shell import doctor_command, explain_command, options_command, report_command, tune_command
from cachedit_fx.shell.user_code import is_ours

FINE, FAILED, WRONG_USAGE = 0, 1, 2

_EXIT_CODES = """\
exit codes:
  0  everything is fine
  1  the result is negative: a model is not cached, a target is not reached,
     a check of doctor failed
  2  an argument is wrong, or the model cannot be made or called
"""


class Command(Protocol):
    """A module with one command.

    Attributes:
        SUMMARY: One line for the list of the commands.
        DESCRIPTION: What `--help` of the command says, in lines of at most 80 characters.
    """

    SUMMARY: str
    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, given: argparse.Namespace) -> bool:
        """Runs the command and prints its result. Returns whether the result is positive."""
        ...


COMMANDS: dict[str, Command] = {
    "explain": explain_command,
    "report": report_command,
    "tune": tune_command,
    "doctor": doctor_command,
    "options": options_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 1 or 2 (see `cachedit-fx --help`).

    Raises:
        SystemExit: An argument is wrong (code 2), or the help or the version was printed (code 0).
    """
    given = _parser().parse_args(argv)
    try:
        return FINE if COMMANDS[given.command].run(given) else FAILED
    except (ConfigError, ImportError, NoMatchError, PatternError) as error:
        if getattr(given, "traceback", False) or not is_ours(error):
            raise
        print(error, file=sys.stderr)
        return FAILED if isinstance(error, NoMatchError | PatternError) else WRONG_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cachedit-fx",
        description="Caching for compiled diffusion transformers, from the shell.",
        epilog=f"{_EXIT_CODES}\ncachedit-fx COMMAND --help describes one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cachedit-fx {_version.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
    return parser
