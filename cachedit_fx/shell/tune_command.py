"""`cachedit-fx tune`: finds which steps to compute for a target."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.shell.command_arguments import (
    FACTORY,
    add_factory,
    add_json,
    add_output,
    json_alone,
    print_result,
    wrote,
)
from cachedit_fx.shell.user_code import errors_reported, make
from cachedit_fx.tuning.points import Quality
from cachedit_fx.tuning.saved import config_to, configs_to
from cachedit_fx.tuning.tune import tune
from cachedit_fx.tuning.tuning_result import TuneResult

SUMMARY = "find which steps to compute for a quality or a speed-up"
DESCRIPTION = f"""\
Runs the calls of a pipeline, and searches for the configuration that reaches a
target. Exit code 0: the target is reached. 1: it is not.

{FACTORY}\
(pipe, [kwargs, ...]) with one dict per call.

  cachedit-fx tune mine.py:make --target fastest --at-least psnr=40 --save t.yaml
  cachedit-fx report mine.py:make --config t.yaml
"""
# Arguments of `tune` that are passed on if they are given.
_PASSED = ("target", "at_least", "at_most", "budget", "alternatives", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --target TARGET [options] factory"
    add_factory(parser)
    parser.add_argument("--target", required=True, help="fastest, best, or a limit alone, such as psnr=35")
    parser.add_argument("--at-least", metavar="LIMIT", help="for fastest: psnr=35 (dB); for best: speedup=2")
    parser.add_argument("--at-most", metavar="LIMIT", help="for fastest: rel_l2=0.05")
    parser.add_argument("--budget", metavar="LIMIT", help="runs=36 (the default) or seconds=300")
    parser.add_argument("--alternatives", metavar="WHICH", help="fewer steps, other schedulers: report, choose or off")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue an interrupted search from this file")
    add_output(parser, "--save", "write the configuration (YAML, or JSON if PATH ends in .json)")
    add_output(parser, "--plot", "write quality over speed as a chart (png, svg or pdf)")
    add_json(parser)


def run(given: argparse.Namespace) -> bool:
    """Prints the result of the search. Returns whether the target is reached."""
    passed = {name: value for name in _PASSED if (value := getattr(given, name)) is not None}
    with json_alone(given):
        made = make(given.factory)
        with errors_reported("a call of the pipeline"):
            result = tune(made.target, made.calls, **passed)
    print_result(given, f"{result}\n  config:    {_shown(result)}", to_dict(result))
    if given.save:
        wrote(result.save(given.save))
    if given.plot:
        result.plot(given.plot)
        wrote(given.plot)
    return result.is_reached


def _shown(result: TuneResult) -> str:
    """The fields of the configuration, with the forecaster's name only: its factors fill a screen."""
    if not isinstance(result.config, CacheConfig):
        return "; ".join(f"{name}: {_fields(config)}" for name, config in result.config.items())
    return _fields(result.config)


def _fields(config: CacheConfig) -> str:
    fields = config_to(config)
    names = {"forecaster": fields["forecaster"] and fields["forecaster"]["type"]}
    return ", ".join(f"{name}={value}" for name, value in (fields | names).items())


def to_dict(result: TuneResult) -> dict[str, Any]:
    """The result in a form that JSON can store."""
    return {
        "target": str(result.target),
        "is_reached": result.is_reached,
        "is_confirmed": result.is_confirmed,
        "predicted": _quality(result.predicted),
        "verified": _quality(result.verified),
        "cache_config": configs_to(result.config),
        "signature": result.signature,
        "frontier": [
            {
                "cache_config": configs_to(point.config),
                "quality": _quality(point.quality),
                "is_measured": point.is_measured,
            }
            for point in result.frontier
        ],
    }


def _quality(quality: Quality) -> dict[str, float | None]:
    return {name: v if math.isfinite(v) else None for name, v in dataclasses.asdict(quality).items()}
