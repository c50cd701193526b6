"""Computes the figures that are printed from what was measured. Ratios are medians over rounds, with quartiles.

A step is compared with the same step of the reference, which runs in the same process and round. Generations of two
variants are compared if they ran in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.driver import Results
from benchmarks.pipeline_variants import PEERS, PIPELINE_VARIANTS
from benchmarks.pipelines import relative_difference
from benchmarks.work import Work

DISPATCH_BOUND = ("flux-dispatch", "flux-small")  # The fixed cost of a call dominates in these works.
Figure = list[float]  # Median, first quartile, third quartile.
Round = dict[str, Any]


def summarize(work: Work, results: Results) -> dict[str, Any]:
    """Returns everything that the tables of a work show, as JSON can store it."""
    rows = {name: _row(work, results, name) for name in results.variants if name not in results.errors}
    if "ours" in rows:
        rows["floor"] = _floor(work, results.variants["ours"]["rounds"])
    found = {
        "title": work.title,
        "steps": work.num_steps,
        "calls": len(work.guidance_branches),
        "mask": "".join(map(str, work.mask)),
        "rows": rows,
        "targets": targets(work, rows),
        "notes": [*dict.fromkeys(v.note for name in rows if (v := PIPELINE_VARIANTS.get(name)) and v.note)],
        "errors": results.errors,
    }
    profile = results.variants.get("ours", {}).get("profile")
    return found | ({"profile": profile} if profile else {})


def targets(work: Work, rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures that this project aims to improve, with what they should be at most."""
    ours = rows.get("ours")
    if ours is None:
        return []
    peers = {name: rows[name]["ours_ratio"] for name in PEERS if name in rows}
    found = [
        ("reused step / floor", 1.2 if work.name in DISPATCH_BOUND else 1.05, ours["reused_ratio"]),
        ("computed step / plain", 1.02, ours["computed_ratio"]),
    ]
    if peers:
        best = max(peers, key=lambda name: peers[name][0])
        found.append((f"generation / best peer ({best})", 0.95, peers[best]))
    return [
        {"name": name, "at_most": at_most, "measured": measured, "met": measured[0] <= at_most}
        for name, at_most, measured in found
    ]


def _row(work: Work, results: Results, name: str) -> dict[str, Any]:
    entry = results.variants[name]
    rounds, caches = entry["rounds"], PIPELINE_VARIANTS[name].caches
    found: dict[str, Any] = {
        "computed_ms": _step_ms(work, rounds, reused=False),
        "computed_ratio": _figure([_step_ratio(work, each, reused=False) for each in rounds]),
    }
    if caches:
        found["reused_ms"] = _step_ms(work, rounds, reused=True)
        found["reused_ratio"] = _figure([_step_ratio(work, each, reused=True) for each in rounds])
    for clock in ("cpu", "wall"):
        found[f"generation_{clock}_ms"] = _round(1e3 * statistics.median(each[clock] for each in rounds))
    for base in ("plain", "ours"):
        if base in results.variants and base not in results.errors:
            others = results.variants[base]["rounds"]
            pairs = [(each["cpu"], other["cpu"]) for each, other in zip(rounds, others, strict=True)]
            found[f"{base}_ratio"] = _figure([a / b if base == "plain" else b / a for a, b in pairs])
    found["rounding"] = _round(max(each["rounding"] for each in rounds))
    return found | _costs(results, name)


def _floor(work: Work, rounds: Sequence[Round]) -> dict[str, Any]:
    """Returns the row of the reference in the process of cachedit_fx."""
    references = [each["reference"] for each in rounds]
    return {
        "computed_ms": _step_ms(work, references, reused=False),
        "reused_ms": _step_ms(work, references, reused=True),
        "generation_cpu_ms": _round(1e3 * statistics.median(each["cpu"] for each in references)),
        "generation_wall_ms": _round(1e3 * statistics.median(each["wall"] for each in references)),
        "ours_ratio": _figure([each["cpu"] / each["reference"]["cpu"] for each in rounds]),
    }


def _costs(results: Results, name: str) -> dict[str, Any]:
    """Returns what the variant costs besides its steps, and how its result differs from those of others."""
    entry, variants = results.variants[name], results.variants
    memory, compiles = entry["memory"] or {}, PIPELINE_VARIANTS[name].compiles
    found: dict[str, Any] = {}
    if compiles and entry["compile"]:
        cold = entry["compile"][-1]
        found |= {"cold_s": _round(cold["cpu"]), "graphs": cold["graphs"]}
        plain = variants.get("plain", {}).get("compile")
        if plain:
            found["cold_ratio"] = _round(cold["cpu"] / plain[-1]["cpu"])
        if entry["warm"]:
            found["warm_ratio"] = _round(entry["warm"][-1]["cpu"] / cold["cpu"])
    for key in ("peak", "state_bytes", "state_bytes_after", "calls", "fast_calls", "why_not_fast"):
        if key in memory:
            found[key] = memory[key]
    for base in ("plain", "ours"):
        theirs = (variants.get(base, {}).get("memory") or {}).get("latents")
        if theirs and "latents" in memory:
            difference = relative_difference(torch.tensor(memory["latents"]), torch.tensor(theirs))
            found[f"difference_from_{base}"] = _round(difference)
    return found


def _kind(work: Work, *, reused: bool) -> list[int]:
    """Returns the reused or the computed steps; step 0 is left out, since it includes the start of the pipeline."""
    return [i for i, computes in enumerate(work.mask) if i and computes != reused]


def _step_ms(work: Work, rounds: Sequence[Round], *, reused: bool) -> float:
    times = [each["steps"][i]["cpu"] for each in rounds for i in _kind(work, reused=reused)]
    return _round(1e3 * statistics.median(times))


def _step_ratio(work: Work, each: Round, *, reused: bool) -> float:
    mine, theirs = each["steps"], each["reference"]["steps"]
    return statistics.median(mine[i]["cpu"] / theirs[i]["cpu"] for i in _kind(work, reused=reused))


def _figure(ratios: Sequence[float]) -> Figure:
    if len(ratios) == 1:
        return [_round(ratios[0])] * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [_round(middle), _round(low), _round(high)]


def _round(value: float) -> float:
    """Four significant digits, which are more than the tables show."""
    return float(f"{value:.4g}")
