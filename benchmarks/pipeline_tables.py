"""Writes the tables of the pipeline benchmark, and puts them into README.md and docs/performance.md.

The tables contain nothing but what docs/performance.json has, which one run on one machine has written. So no figure is
copied by hand:

    python -m benchmarks.pipeline_tables          # writes the pages again from docs/performance.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import markdown
from benchmarks.pipeline_profile import TOTAL
from benchmarks.pipeline_variants import PIPELINE_VARIANTS

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "performance.json"
DIFFERENCES = ("difference_from_plain", "difference_from_ours")
Measured = Mapping[str, Any]  # What `run.py` writes.


# The variants in README.md, and what they are called there.
SHORT = {
    "ours": "cachedit_fx",
    "cache-dit": "cache-dit",
    "cache-dit-regional": "cache-dit, regional",
    "fbc": "FirstBlockCache",
    "magcache": "MagCache",
}


def readme(measured: Measured) -> str:
    """Returns the short table of README.md: the time of a generation over that of the plain compiled pipeline."""
    works = measured["works"].values()
    names = [name for name in SHORT if any(name in work["rows"] for work in works)]
    rows = [["pipeline", *(SHORT[name] for name in names)]]
    rows += [[work["title"], *(_of_plain(work, name) for name in names)] for work in works]
    return f"Measured on a CPU: {_hardware(measured)}.\n\n{markdown(rows)}"


def overview(measured: Measured) -> str:
    """Returns the table of all works and variants in docs/performance.md."""
    works = measured["works"].values()
    names = list(dict.fromkeys(name for work in works for name in work["rows"] if name != "floor"))
    rows = [["generation / plain", *(work["title"] for work in works)]]
    rows += [[name, *(_of_plain(work, name) for work in works)] for name in names]
    goals = list(dict.fromkeys(_short(target["name"]) for work in works for target in work["targets"]))
    for goal in goals:
        found = [[t for t in work["targets"] if _short(t["name"]) == goal] for work in works]
        rows.append([f"ours: {goal}", *(_median(entry[0]["measured"]) if entry else "-" for entry in found)])
    return markdown(rows)


def performance(measured: Measured) -> str:
    """Returns the tables of docs/performance.md."""
    works = (work_section(work) for work in measured["works"].values())
    return "\n\n".join([_machine(measured), overview(measured), *works])


def work_section(work: Mapping[str, Any]) -> str:
    """Returns the tables of one work."""
    rows = work["rows"]
    parts = [
        f"### {work['title']}",
        f"{work['steps']} steps of {work['calls']} call(s), 1 = computed: {work['mask']}.",
        _target_table(work),
        _time_table(rows),
        _cost_table(rows),
        _dispatch(rows),
        _profile_table(work.get("profile")),
        "\n".join(f"- {note}" for note in work["notes"]),
        "\n".join(f"- {name} failed: {error}" for name, error in work["errors"].items()),
    ]
    return "\n\n".join(filter(None, parts))


def write_pages(measured: Measured, root: Path = ROOT) -> None:
    """Writes the tables between the markers of the pages."""
    for name, tables in (("README.md", readme(measured)), ("docs/performance.md", performance(measured))):
        page = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(put(page, tables), encoding="utf-8")


def put(page: str, tables: str) -> str:
    """Returns the page with the tables between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{rest[rest.index(END) :]}"


def _machine(measured: Measured) -> str:
    return (
        f"{_hardware(measured)}; F{measured['fn']}B{measured['bn']}, mask with the policy "
        f"{measured['policy']!r}, compiled by {measured['inner']}; CPU time, {measured['rounds']} interleaved rounds.\n"
        f"`{measured['command']}`"
    )


def _hardware(measured: Measured) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    return f"{measured['hardware']}; {versions}"


def _target_table(work: Mapping[str, Any]) -> str:
    rows = [["target", "at most", "measured (quartiles)", ""]]
    for target in work["targets"]:
        met = "met" if target["met"] else "missed"
        rows.append([target["name"], f"{target['at_most']:g}", _spread(target["measured"]), met])
    return markdown(rows) if work["targets"] else ""


def _time_table(rows: Mapping[str, Any]) -> str:
    header = ["variant", "generation, ms", "wall, ms", "/ plain", "ours / it", "computed step, ms", "/ plain"]
    found = [[*header, "reused step, ms", "/ floor"]]
    for name, row in rows.items():
        ours = row.get("ours_ratio") if name != "ours" else None
        found.append(
            [
                name,
                _number(row["generation_cpu_ms"], 0),
                _number(row["generation_wall_ms"], 0),
                _spread(row.get("plain_ratio")) if name != "plain" else "1",
                _spread(ours),
                _number(row["computed_ms"], 2),
                _spread(row.get("computed_ratio")),
                _number(row.get("reused_ms"), 2),
                _spread(row.get("reused_ratio")),
            ]
        )
    return markdown(found)


def _cost_table(rows: Mapping[str, Any]) -> str:
    header = ["variant", "cold compile, CPU s", "/ plain", "warm start / cold", "graphs", "state, KiB", "after, KiB"]
    found = [[*header, "peak memory, MiB", "rounding", "result: from plain", "from ours"]]
    for name, row in rows.items():
        if name == "floor":
            continue
        caches = PIPELINE_VARIANTS[name].caches
        found.append(
            [
                name,
                _number(row.get("cold_s"), 1),
                _number(row.get("cold_ratio"), 2),
                _number(row.get("warm_ratio"), 2),
                str(row.get("graphs", "-")),
                _number(row.get("state_bytes") if caches else None, 0, scale=1024),
                _number(row.get("state_bytes_after") if caches else None, 0, scale=1024),
                _number(row.get("peak"), 2, scale=2**20),
                f"{row['rounding']:.1e}",
                *(f"{row[key]:.1e}" if key in row else "-" for key in DIFFERENCES),
            ]
        )
    return markdown(found)


def _dispatch(rows: Mapping[str, Any]) -> str:
    ours = rows.get("ours", {})
    if "calls" not in ours:
        return ""
    why = f" ({ours['why_not_fast']})" if ours["why_not_fast"] else ""
    return f"Fast dispatch serves {ours['fast_calls']} of {ours['calls']} calls of a generation{why}."


def _profile_table(profile: Mapping[str, Any] | None) -> str:
    """Returns where the time of a step goes, in milliseconds."""
    if not profile:
        return ""
    names = [name for name in dict.fromkeys((*profile["reused"], *profile["computed"])) if name != TOTAL]
    rows = [["part of a call of ours, ms", "reused step", "computed step"]]
    rows += [
        [name, *(_number(profile[kind].get(name), 3) for kind in ("reused", "computed"))] for name in [*names, TOTAL]
    ]
    return markdown(rows)


def _of_plain(work: Mapping[str, Any], name: str) -> str:
    return _median(work["rows"].get(name, {}).get("plain_ratio"))


def _short(name: str) -> str:
    return name.split(" (")[0]


def _median(figure: list[float] | None) -> str:
    return "-" if figure is None else f"{figure[0]:.3f}"


def _spread(figure: list[float] | None) -> str:
    return "-" if figure is None else f"{figure[0]:.3f} ({figure[1]:.3f} to {figure[2]:.3f})"


def _number(value: float | None, digits: int, *, scale: float = 1) -> str:
    return "-" if value is None else f"{value / scale:.{digits}f}"


if __name__ == "__main__":
    write_pages(json.loads(MEASURED.read_text(encoding="utf-8")))
