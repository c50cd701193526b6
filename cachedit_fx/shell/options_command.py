"""`cachedit-fx options`: every option."""

from __future__ import annotations

import argparse

from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.reference import options_data, options_table, options_text
from cachedit_fx.shell.command_arguments import add_json, print_result

SUMMARY = "list every option: its default, what is allowed, what it means"
DESCRIPTION = """\
Lists the options of CacheConfig, which enable_cache, torch.compile(options=...)
and -o NAME=VALUE of explain and report accept.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    add_json(parser)


def run(given: argparse.Namespace) -> bool:
    """Prints the options."""
    print_result(given, (options_table if given.markdown else options_text)(OPTIONS), options_data(OPTIONS))
    return True
