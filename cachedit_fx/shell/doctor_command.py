"""`cachedit-fx doctor`: whether caching works on this machine, and for which models it was tested."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cachedit_fx.shell.checkup import Check, checks, devices, versions
from cachedit_fx.shell.command_arguments import add_json, print_result
from cachedit_fx.shell.installed_models import InstalledModels, installed_models

SUMMARY = "check this installation, and show which models were tested"
DESCRIPTION = """\
Shows the versions and the devices, compiles a function and caches a small
transformer, and lists which models of the installed diffusers were tested.
Exit code 0: caching works. 1: there is a problem.
"""
_NEVER_CACHED = (
    "Calls with gradients: call the model under torch.no_grad().",
    "Modules in training mode: call model.eval().",
    "UNets, and other models without a loop over blocks of one structure.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(given: argparse.Namespace) -> bool:
    """Prints what was found. Returns whether there is no problem."""
    found = [*checks()]
    is_fine = not any(check.kind == "problem" for check in found)
    models = installed_models()
    facts = versions(), devices()
    data = {
        "is_fine": is_fine,
        "versions": facts[0],
        "devices": facts[1],
        "checks": [check.to_dict() for check in found],
        "models": models.to_dict() if models is not None else None,
        "never_cached": [*_NEVER_CACHED],
    }
    print_result(given, "\n".join(_lines(found, *facts, models)), data)
    return is_fine


def _lines(
    found: Sequence[Check],
    installed: Mapping[str, str | None],
    present: Sequence[Mapping[str, Any]],
    models: InstalledModels | None,
) -> Iterator[str]:
    num_problems = sum(check.kind == "problem" for check in found)
    problems = f"{num_problems} problem{'s' * (num_problems != 1)}" if num_problems else "no problem"
    yield f"cachedit-fx doctor found {problems}."
    yield "\nVersions"
    yield from _wrapped(", ".join(f"{name} {version or 'is not installed'}" for name, version in installed.items()))
    yield "\nDevices"
    for device in present:
        yield from _wrapped(_device(device))
    yield "\nChecks"
    for check in found:
        yield from _wrapped(f"{check.kind:8} {check.text}." + (f" What to do: {check.cure}." if check.cure else ""), 9)
    yield "\nModels of diffusers"
    yield from _models(models)
    yield "\nNever cached"
    for line in _NEVER_CACHED:
        yield from _wrapped(line)


def _device(device: Mapping[str, Any]) -> str:
    facts = [f"{name} {value}" for name, value in device.items() if name not in ("device", "name", "bytes", "cores")]
    if "bytes" in device:
        facts.insert(0, f"{device['bytes'] / 2**30:.0f} GiB")
    if "cores" in device:
        facts.insert(0, f"{device['cores']} cores")
    return ", ".join([f"{device['device']}: {device['name']}", *facts])


def _models(models: InstalledModels | None) -> Iterator[str]:
    if models is None:
        yield from _wrapped("diffusers is not installed.")
        return
    total = len(models.cached) + len(models.uncached) + len(models.untested)
    yield from _wrapped(
        f"{len(models.cached)} of {total} transformer classes were tested with diffusers {models.tested_with}, and are "
        "cached (docs/models.md). Some of them need something:"
    )
    names_by_need: dict[str, list[str]] = {}
    for name, need in models.cached.items():
        names_by_need.setdefault(need, []).append(name)
    for need, names in names_by_need.items():
        if need:
            yield from _wrapped(f"- {need}: {_listed(names)}", 2)
    if models.uncached:
        yield from _wrapped("Not cached:")
    for name, reason in models.uncached.items():
        yield from _wrapped(f"- {name}: {reason}", 2)
    yield from _wrapped(f"Not tested; explain shows whether they are cached: {_listed(models.untested)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of at most 100 characters, indented by 2; all but the first by `indent` more."""
    return textwrap.wrap(
        *(text, 100),
        initial_indent="  ",
        subsequent_indent=" " * (2 + indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
