"""The documentation of the options, generated from their declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cachedit_fx.config.options import Option, options_of
from cachedit_fx.config.rules import RULES
from cachedit_fx.forecasters.forecaster import Forecaster

POLICY = (
    "The rule that decides whether a step is reused: a rule of `cachedit_fx.policies` with its settings, or its name, "
    "with its settings in the fields named below."
)


class Entry(NamedTuple):
    """A line of the table: an option with its default, what is allowed and what it means; or a heading alone."""

    option: str
    default: str = ""
    values: str = ""
    meaning: str = ""


def meaning(declared: Option) -> str:
    """What an option means, and whether another value recompiles."""
    return f"{declared.doc} Another value recompiles." if declared.structural else declared.doc


def with_attributes(doc: str | None, options: Mapping[str, Option]) -> str:
    """A docstring with a section about every option, in front of the section about its errors."""
    if doc is None:  # Python runs without docstrings.
        return ""
    listed = "\n".join(
        "\n".join(_wrapped(f"{name}: {meaning(declared)}", 120, first=" " * 8, others=" " * 12))
        for name, declared in options.items()
    )
    before, raises, after = doc.partition("    Raises:\n")
    return f"{before}    Attributes:\n{listed}\n\n{raises}{after}"


def options_table(options: Mapping[str, Option]) -> str:
    """The options as a table in Markdown, with the settings of the rules below `policy`."""
    rows = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for entry in _entries(options):
        option = entry.option if entry.meaning else f"**{entry.option}**"
        rows.append(f"| {option} | {entry.default} | {entry.values} | {entry.meaning} |")
    return "\n".join(rows)


def options_text(options: Mapping[str, Option]) -> str:
    """The same for a terminal."""
    parts = []
    for entry in _entries(options):
        if not entry.meaning:
            parts.append(f"\n{entry.option}\n{'-' * len(entry.option)}")
            continue
        head = f"{entry.option}  (default: {entry.default}; {entry.values})"
        parts.append("\n".join([head, *_wrapped(entry.meaning, 100, first="    ", others="    ")]))
    return "\n".join(parts).strip().replace("`", "")


def options_data(options: Mapping[str, Option]) -> list[dict[str, str]]:
    """The same as data: one dict per option, with the heading of its group."""
    group, found = "", []
    for entry in _entries(options):
        if not entry.meaning:
            group = entry.option
            continue
        found.append({"group": group} | {k: v.replace("`", "") for k, v in entry._asdict().items()})
    return found


def _wrapped(text: str, width: int, *, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _entries(options: Mapping[str, Option]) -> Iterator[Entry]:
    for name, declared in options.items():
        if declared.group:
            yield Entry(declared.group)
        if name == "decision_rule":
            yield Entry("`policy`", "Threshold()", "a rule, its name or its mapping", POLICY)
            for rule in RULES.values():
                for setting, of_rule in options_of(rule).items():
                    yield _entry(f"`{rule.__name__}({setting}=)` or `{of_rule.flat}`", of_rule)
        if not declared.flat_of:
            yield _entry(f"`{name}`", declared)


def _entry(option: str, declared: Option) -> Entry:
    return Entry(option, _shown(declared.default), declared.values, meaning(declared))


def _shown(default: Any) -> str:
    if isinstance(default, Forecaster):
        return f"{type(default).__name__}()"
    if isinstance(default, str):
        return f'"{default}"'
    if isinstance(default, int) and default and default % 2**30 == 0:
        return f"{default // 2**30} * 2**30"
    return str(default)
