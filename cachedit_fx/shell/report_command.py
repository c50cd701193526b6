"""`cachedit-fx report`: runs a pipeline with the cache, and reports what was reused and why."""

from __future__ import annotations

import argparse

from cachedit_fx.config.cache_config import RECOMMENDED
from cachedit_fx.inspect.reports import RunReport, report
from cachedit_fx.integrations.pipelines import enable_cache
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
from cachedit_fx.shell.user_code import errors_reported, make

SUMMARY = "run a pipeline with the cache, and show what it reused"
DESCRIPTION = f"""\
Enables the cache of a pipeline, runs its calls, and reports every decision with
its reason. With -o shadow=true, the error of reusing each step is measured.
Exit code 0: steps were reused. 1: none was, or a call ran without the cache.

{FACTORY}\
(pipe, [kwargs, ...]) with one dict per call, or what explain accepts.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_factory(parser)
    add_configuration(parser)
    add_output(parser, "--html", "write the report as a page")
    add_output(parser, "--plot", "write the steps as a chart (png, svg or pdf)")
    add_json(parser)


def run(given: argparse.Namespace) -> bool:
    """Prints the report. Returns whether the cache worked as it should."""
    arguments = configuration(given)
    with json_alone(given):
        made = make(given.factory)
        enable_cache(made.target, **arguments)
        with errors_reported("a call of the pipeline"):
            made.run()
    found = report(made.target, every_generation=True)
    print_result(given, str(found), found.to_dict())
    if given.html:
        wrote(found.to_html(given.html))
    if given.plot:
        found.plot(given.plot)
        wrote(given.plot)
    return is_positive(found, is_shadow=arguments.get("cache_config", RECOMMENDED).shadow)


def is_positive(found: RunReport, *, is_shadow: bool) -> bool:
    """Whether every call ran with the cache, and steps were reused. In shadow mode, every step is computed."""
    counts = found.stats.calls.values()
    has_reused = is_shadow or any(count.reused for count in counts)
    return has_reused and all(count.total and not count.uncached and not count.bypassed for count in counts)
