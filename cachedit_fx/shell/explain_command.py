"""`cachedit-fx explain`: what the compiler does with a model, and why."""

from __future__ import annotations

import argparse

from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.inspect.explanation.result import GRAPHS
from cachedit_fx.shell.command_arguments import (
    FACTORY,
    add_configuration,
    add_factory,
    add_json,
    add_output,
    configuration,
    json_alone,
    print_result,
    wrote,
)
from cachedit_fx.shell.user_code import arguments_of, errors_reported, make

SUMMARY = "show what the compiler does with a model, and why"
DESCRIPTION = f"""\
Shows what is cached in a model, how, or why not. Nothing is compiled.
Exit code 0: every transformer is cached. 1: one of them is not.

{FACTORY}\
(target, kwargs), (target, args), (target, args, kwargs) or (pipe, [kwargs, ...]).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_factory(parser)
    add_configuration(parser)
    parser.add_argument("--graph", choices=GRAPHS, help="print this graph instead")
    parser.add_argument(
        "--diff",
        nargs="*",
        metavar="BLOCK",
        help="print the graphs before and after as a diff; expand these blocks, or 'all'",
    )
    add_output(parser, "--html", "write the explanation as a page")
    add_json(parser)


def run(given: argparse.Namespace) -> bool:
    """Prints the explanation. Returns whether every transformer is cached."""
    config = configuration(given).get("cache_config")
    with json_alone(given):
        made = make(given.factory)
        args, kwargs = arguments_of(made.calls[0])
        with errors_reported("the call of the model"):
            explanation = explain(made.target, *args, cache_config=config, **kwargs)
    if given.graph:
        text = explanation.graph(given.graph).print_readable(print_output=False)
    elif given.diff is not None:
        text = explanation.diff(expand=True if given.diff == ["all"] else given.diff)
    else:
        text = str(explanation)
    print_result(given, text, explanation.to_dict())
    if given.html:
        wrote(explanation.to_html(given.html))
    return explanation.is_cached
