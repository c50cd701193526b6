"""Writes the tables of the quality benchmark into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.quality_configs import FAMILIES
from benchmarks.quality_defaults import default_table
from benchmarks.quality_forecasters import cost_table, forecaster_tables
from benchmarks.quality_frontier import TARGETS, Row, frontier, least_time, reach
from benchmarks.quality_guidance import guidance_table

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
TITLES = {"digits": "Digits (FLUX, no guidance)", "clips": "Clips (Wan, guidance scale 3)"}
Measured = Mapping[str, Any]  # The results of one model, as `quality.py` writes them as JSON.


def rows_of(measured: Measured, family: str) -> list[Row]:
    """Returns the configurations of a family that ran."""
    return [row for row in measured["nearness"] if row["family"] == family and "skipped" not in row]


def times_of(measured: Measured, family: str) -> dict[str, Row]:
    return {row["name"]: row for row in measured["times"] if row["family"] == family and "skipped" not in row}


def families_of(measured: Measured) -> list[str]:
    return [family for family in FAMILIES if any(row["family"] == family for row in measured["nearness"])]


def rows_by_column(measured: Measured) -> dict[str, list[Row]]:
    """Returns the rows of every family, with what `tune` found apart from the others of ours."""
    found: dict[str, list[Row]] = {}
    for family in families_of(measured):
        for row in rows_of(measured, family):
            found.setdefault("ours, tuned" if row["group"] == "tuned" else family, []).append(row)
    return found


def tables(measured: Mapping[str, Any]) -> str:
    """Returns everything that is written between the markers of the page, for the results of all models."""
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    parts = [f"{measured['hardware']}; {versions}\n`{measured['command']}`"]
    for model, found in measured["models"].items():
        parts += [f"## Measured: {TITLES.get(model, model)}", *model_tables(found)]
    return "\n\n".join(parts)


def model_tables(measured: Measured) -> list[str]:
    """Returns the text below the heading of a model, as paragraphs and tables."""
    ours = rows_of(measured, "ours")
    parts = [about(measured), "### Lowest cost of each quality", target_table(measured)]
    for name, rows in rows_by_column(measured).items():
        parts += [f"### Frontier: {name}", frontier_table(rows, times_of(measured, name.partition(",")[0]))]
    if ours:
        parts += ["### The default beside the best at its cost", figures.markdown(default_table(ours))]
        parts += ["### Forecasters at equal decisions"]
        for title, table in forecaster_tables(ours).items():
            parts += [f"{title} (PSNR, dB):", figures.markdown(table)]
        parts += ["The lowest share of FLOPs with which each reaches a quality:", figures.markdown(cost_table(ours))]
    if any(row["guidance"] for row in ours):
        table = guidance_table(ours, rows_of(measured, "cache-dit"))
        parts += ["### Guidance reuse", figures.markdown(table)]
    if measured["shadow"]:
        parts += ["### Error predicted by shadow mode against the actual error", shadow_table(measured)]
    skipped = skipped_list(measured)
    if skipped:
        parts += ["### Skipped configurations", skipped]
    return parts


def shadow_table(measured: Measured) -> str:
    """Returns the correlation between the error that shadow mode predicts for reused steps and the actual error."""
    rows = [["mask", "forecaster", "reused steps", "correlation"]]
    rows += [
        [row["mask"], row["forecaster"], str(row["steps"]), f"{row['correlation']:.3f}"] for row in measured["shadow"]
    ]
    return figures.markdown(rows)


def about(measured: Measured) -> str:
    reference = measured["reference"]
    share = reference.get("accuracy")
    recognized = "" if share is None else f"; a classifier recognizes {share:.0%} of the uncached ones"
    times = (
        f" Times: CPU time of one image, both models compiled by {measured['inner']}, medians of the ratios of "
        f"{measured['rounds']} rounds, interleaved with the uncached model."
        if measured["times"]
        else " Times were not measured."
    )
    return f"{reference['images']} images in batches of {measured['batch']}{recognized}.{times}"


def target_table(measured: Measured) -> str:
    """Returns, for each PSNR, the least share of FLOPs and the least time of every family, and their ratios to ours.

    What `tune` found is in a column of its own, because the others were not chosen for the model.
    """
    rows_by = rows_by_column(measured)
    columns = [*rows_by]
    others = [name for name in columns if not name.startswith("ours")] if "ours" in columns else []
    rows = [["PSNR", "share of the uncached model", *columns, *(f"ours / {other}" for other in others)]]
    for target in TARGETS:
        found = {name: reach(rows_by[name], target) for name in columns}
        shares = {name: None if each is None else each.share for name, each in found.items()}
        bounds = {name for name, each in found.items() if each is not None and each.is_bound}
        times = {
            name: least_time(rows_by[name], times_of(measured, name.partition(",")[0]), target, "cpu_ratio")
            for name in columns
        }
        for title, values in (("FLOPs", shares), ("time", times)) if measured["times"] else (("FLOPs", shares),):
            cells = [("≤ " if f in bounds and values[f] is not None else "") + _text(values[f]) for f in columns]
            ratios = [_text(_ratio(values["ours"], values[other])) for other in others]
            rows.append([f"{target:g} dB", title, *cells, *ratios])
    return figures.markdown(rows)


def frontier_table(found: Sequence[Row], times: Mapping[str, Row]) -> str:
    """Returns the configurations on the frontier of these rows, with their times."""
    header = ["configuration", "FLOPs", "PSNR, dB", "worst image", "SSIM", "relative L2", "recognized"]
    rows = [header + ["time", "ms"] * bool(times)]
    for row in frontier(found):
        timed = times.get(row["name"], {})
        rows.append(
            [
                row["name"],
                _text(row["share"]),
                _text(row["psnr"], 1),
                _text(row["psnr_least"], 1),
                _text(row["ssim"], 4),
                _text(row["rel_l2"], 4),
                "-" if row["accuracy"] is None else f"{row['accuracy']:.0%}",
                *[_text(timed.get("cpu_ratio")), _text(timed.get("ms"), 0)] * bool(times),
            ]
        )
    return figures.markdown(rows)


def skipped_list(measured: Measured) -> str:
    """Returns the configurations that did not run, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in [*measured["nearness"], *measured["times"]]:
        if "skipped" in row:
            reasons.setdefault(row["skipped"], []).append(f"{row['family']}: {row['name']}")
    reasons |= {reason: [family] for family, reason in measured["errors"].items()}
    return "\n".join(f"- {reason} ({_named(names)})" for reason, names in reasons.items())


def write_page(path: Path, measured: Mapping[str, Any], plot: str | None) -> None:
    """Writes the tables between the markers of the page.

    Raises:
        ValueError: The page has no markers.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} must have a line {BEGIN} and after it a line {END}")
    picture = f"![PSNR over the share of FLOPs]({plot})\n\n" if plot else ""
    text = f"{before}{BEGIN}\n\n{picture}{tables(measured)}\n\n{END}{after}"
    path.write_text(text, encoding="utf-8")


def _named(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else mine / theirs


def _text(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
