"""The pages of a run: one self-contained HTML file, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

from benchmarks.figures import markdown
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.records import FAILED, PASSED, SKIPPED
from benchmarks.variants import VARIANTS
from cachedit_fx.inspect.pages.render import asset

Data = Mapping[str, Any]  # What `Results` holds.
ORDER = (FAILED, PASSED, SKIPPED)
COLORS = {"computed_ms": "var(--computed)", "reused_ms": "var(--reused)"}


def _number(digits: int, scale: float = 1) -> Callable[[float], str]:
    return lambda value: f"{value * scale:.{digits}f}"


# Title, key of the figures, and how a number is written.
TIMES = (
    ("computed step, ms", "computed_ms", _number(2)),
    ("/ plain", "computed_to_plain", _number(3)),
    ("reused step, ms", "reused_ms", _number(2)),
    ("/ floor", "reused_to_floor", _number(3)),
    ("generation, ms", "generation_ms", _number(1)),
    ("/ plain", "generation_to_plain", _number(3)),
)
COSTS = (
    ("compile, s", "compile_s", _number(1)),
    ("most memory, GiB", "peak_bytes", _number(2, 2**-30)),
    ("beyond what there was, MiB", "beyond_bytes", _number(0, 2**-20)),
    ("idle, computed, %", "idle_computed", _number(1, 100)),
    ("idle, reused, %", "idle_reused", _number(1, 100)),
    ("in the profile, %", "idle_reused_profiled", _number(1, 100)),
    ("kernels, computed", "kernels_computed", _number(0)),
    ("kernels, reused", "kernels_reused", _number(0)),
    ("waits, reused", "waits_reused", _number(0)),
)
Table = tuple[list[str], list[list[str]]]


def table(figures: Mapping[str, Data], columns: tuple[tuple[str, str, Callable[[float], str]], ...]) -> Table:
    """Returns the header and one row for each variant; "-" for what is unknown."""
    rows = []
    for name, found in figures.items():
        values = [found.get(key) for _, key, _ in columns]
        rows.append([name, *("-" if v is None else write(v) for v, (_, _, write) in zip(values, columns, strict=True))])
    return ["variant", *(title for title, _, _ in columns)], rows


def checks_by_verdict(data: Data) -> dict[str, list[dict[str, Any]]]:
    """Returns the checks of each verdict, those that failed first."""
    return {verdict: [check for check in data["checks"] if check["verdict"] == verdict] for verdict in ORDER}


def verdict_of(data: Data) -> str:
    """Returns the first sentence of the page."""
    counts = {verdict: len(checks) for verdict, checks in checks_by_verdict(data).items()}
    first = f"{counts[FAILED]} of {sum(counts.values())} checks failed" if counts[FAILED] else "No check failed"
    state = "" if data["state"] == "finished" else f" The run is not complete ({data['state']})."
    return f"{first}; {counts[PASSED]} passed, {counts[SKIPPED]} were skipped.{state}"


def notes_of(entry: Data) -> list[str]:
    """Returns what is to be said below the tables of a work."""
    notes = [VARIANTS[name].note for name in entry["variants"] if VARIANTS[name].note]
    notes += [f"{name} failed: {error}" for errors in ("errors", "failed") for name, error in entry[errors].items()]
    return list(dict.fromkeys(notes)) + [f"{name}: {why}" for name, why in entry["skipped"].items()]


def bars(figures: Mapping[str, Data]) -> list[dict[str, Any]]:
    """Returns the bars of a chart: a computed and a reused step of each variant, in percent of the longest."""
    found = [
        {"name": name, "kind": key.removesuffix("_ms"), "color": color, "ms": values[key]}
        for name, values in figures.items()
        for key, color in COLORS.items()
        if values.get(key)
    ]
    longest = max((bar["ms"] for bar in found), default=1.0)
    return [{**bar, "width": 100 * bar["ms"] / longest} for bar in found]


def as_markdown(data: Data) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    parts = ["# cachedit_fx on a GPU", verdict_of(data), f"{data['hardware']}; {versions}\n\n`{data['command']}`"]
    for verdict, checks in checks_by_verdict(data).items():
        if checks:
            rows = [["case", "check", "expected", "found"]]
            rows += [[c["case"], c["name"], c["expected"], _cell(c["found"], c["reason"])] for c in checks]
            parts += [f"## Checks that {'were ' if verdict == SKIPPED else ''}{verdict}", markdown(rows)]
    for entry in data["speed"]:
        mask = "".join(map(str, entry["mask"]))
        parts += [f"## {entry['title']}", f"Mode {entry['mode'] or 'default'}; 1 = computed: {mask}"]
        parts += [markdown([header, *rows]) for header, rows in _tables(entry)]
        parts.append("\n".join(f"- {note}" for note in notes_of(entry)))
    rows = [["item", "expected, s", "took, s", "note"]]
    rows += [[i["name"], str(i["expected_s"]), str(i["took_s"]), _cell(i["note"])] for i in data["items"]]
    return "\n\n".join(part for part in [*parts, "## What ran", markdown(rows)] if part) + "\n"


def as_html(data: Data) -> str:
    """Returns a page without references to anything outside of it."""
    page = _environment().get_template("page.html.j2")
    works = [
        {**entry, "tables": _tables(entry), "notes": notes_of(entry), "bars": bars(entry["figures"])}
        for entry in data["speed"]
    ]
    return page.render(
        title="cachedit_fx on a GPU",
        styles=asset("page.css"),
        script=asset("page.js"),
        data=data,
        verdict=verdict_of(data),
        checks=checks_by_verdict(data),
        works=works,
        described={name: case.describe() for name, case in CASES.items()},
    )


def write_pages(data: Data, folder: Path) -> None:
    (folder / "page.md").write_text(as_markdown(data), encoding="utf-8")
    (folder / "page.html").write_text(as_html(data), encoding="utf-8")


def _tables(entry: Data) -> list[Table]:
    return [table(entry["figures"], TIMES), table(entry["figures"], COSTS)]


def _cell(*texts: str) -> str:
    return ": ".join(filter(None, texts)).replace("|", "\\|").replace("\n", " ")


def _environment() -> Environment:
    templates = ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader("cachedit_fx.inspect.pages")])
    return Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
