"""Compares forecasters at equal decisions, on any pipeline of the quality benchmark.

Every forecaster runs with the same schedules: masks whose computed steps are evenly spaced, once with a forecast of
what the blocks add and once with a forecast of the model's output; at most two reused steps in a row after three
warm-up steps; and thresholds after four warm-up steps. The tables show the PSNR to the uncached images, and the lowest
share of the uncached model's FLOPs with which a forecaster reaches a quality.

    python -m benchmarks.quality_forecasters
    python -m benchmarks.quality_forecasters --pipeline module:factory --images 20 --batch 4
    python -m benchmarks.quality_forecasters --only "^(last|FoCa|HiCache.*)$" --json forecasters.json
    python -m benchmarks.quality_forecasters --only "^Taylor" --schedule "^(w|r)"    # the start of cache-dit's, too
    python -m benchmarks.quality_forecasters --from forecasters.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import markdown
from benchmarks.quality_configs import FORECASTERS, Config, even_mask, static
from benchmarks.quality_frontier import TARGETS, reach
from benchmarks.quality_worker import Job, NearnessTask
from benchmarks.variants import raise_limits

DEFAULT = "^(?!.* (late|early))"  # Without the variants of TaylorSeer that `late_taylor` describes.
SHARES = (0.21, 0.25, 0.32, 0.39, 0.5)  # Of the steps that an even mask computes.
THRESHOLDS = (0.12, 0.2, 0.3, 0.5)


def forecasters(num_steps: int) -> dict[str, tuple[str, dict[str, Any]] | None]:
    """Returns the forecasters of the quality benchmark, and others from papers, by name."""
    hicache, freqca, spectrum = (f"{name}CalibratorConfig" for name in ("HiCache", "FreqCa", "Spectrum"))
    horizon = {"horizon": float(num_steps)}
    found = FORECASTERS | {
        "HiCache": (hicache, {}),
        "HiCache 1": (hicache, {"order": 1}),
        "HiCache 0.71": (hicache, {"sigma": 0.71}),
        "FreqCa": (freqca, {}),
        "FreqCa 0.3": (freqca, {"low_frequencies": 0.3}),
        "Spectrum": (spectrum, horizon),
        "Spectrum 100": (spectrum, horizon | {"memory": 100}),
        "Spectrum alone": (spectrum, horizon | {"memory": 100, "blend": 1.0}),
    }
    for order in (1, 2):
        for start in ("late", "early"):
            for verdict in ("", " judged"):
                fields = {"taylorseer_order": order, "late": start == "late", "judged": bool(verdict)}
                found[f"Taylor {order} {start}{verdict}"] = ("benchmarks.late_taylor:LateTaylorSeer", fields)
    return found


def schedules(num_steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the fields of every schedule."""
    masks = {count: even_mask(num_steps, count) for count in dict.fromkeys(round(s * num_steps) for s in SHARES)}
    for count, mask in masks.items():
        yield f"blocks {count}", static(mask)
    for count, mask in masks.items():
        yield f"output {count}", static(mask) | {"reach": "output", "probe": "none"}
    limits = {"Bn_compute_blocks": 1, "residual_diff_threshold": 1.0, "max_warmup_steps": 3}
    yield "w3 c2", limits | {"Fn_compute_blocks": 1, "max_continuous_cached_steps": 2}
    for threshold in THRESHOLDS:
        yield (
            f"r{threshold:g} w4",
            {"Fn_compute_blocks": 1, "residual_diff_threshold": threshold, "max_warmup_steps": 4},
        )


def configs(num_steps: int, only: str, schedule: str) -> Iterator[Config]:
    known = forecasters(num_steps)
    for name, fields in schedules(num_steps):
        if not re.search(schedule, name):
            continue
        for which, forecaster in known.items():
            if re.search(only, which):
                yield Config("ours", which, name, fields, forecaster)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    task = NearnessTask(Job("ours", "nearness", args.pipeline, args.images, args.batch))
    measured: dict[str, Any] = {"pipeline": args.pipeline, "reference": task.reference(), "rows": []}
    for config in configs(task.num_steps, args.only, args.schedule):
        row: dict[str, Any] = {"group": config.group, "name": config.name}
        try:
            row |= task.measure(config)
        except Exception as error:
            traceback.print_exc()
            row["skipped"] = f"{type(error).__name__}: {error}"
        measured["rows"].append(row)
        print(f"{config.name}, {config.group}: {row.get('psnr', 0):.2f} dB, {row.get('share', 0):.3f}", file=sys.stderr)
    return measured


def tables(measured: Mapping[str, Any]) -> str:
    rows = [row for row in measured["rows"] if "skipped" not in row]
    groups, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "name"))
    psnr = {(row["group"], row["name"]): row["psnr"] for row in rows}
    best = {name: max(value for (_, other), value in psnr.items() if other == name) for name in names}

    def cell(group: str, name: str) -> str:
        value = psnr.get((group, name))
        return "-" if value is None else f"**{value:.1f}**" if value == best[name] else f"{value:.1f}"

    shares = {name: f"{min(row['share'] for row in rows if row['name'] == name):.3f}" for name in names}
    quality = [["FLOPs", *shares.values()], *([group, *(cell(group, name) for name in names)] for group in groups)]
    costs = []
    for group in groups:
        found = [reach([row for row in rows if row["group"] == group], target) for target in TARGETS]
        costs.append([group, *(f"{'≤ ' * at.is_bound}{at.share:.3f}" if at else "-" for at in found)])
    return "\n\n".join(
        (
            markdown([["forecaster", *names], *quality]),
            markdown([["forecaster", *(f"{target:g} dB" for target in TARGETS)], *costs]),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits", help="'digits', or module:factory (see quality_setup.py)")
    parser.add_argument("--only", default=DEFAULT, help="a regular expression that a forecaster's name must match")
    parser.add_argument("--schedule", default="", help="a regular expression that a schedule's name must match")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--from", type=Path, dest="source", help="such a file, instead of measuring")
    args = parser.parse_args()
    torch.set_num_threads(1)
    raise_limits()
    measured = json.loads(args.source.read_text(encoding="utf-8")) if args.source else measure(args)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(tables(measured))


if __name__ == "__main__":
    main()
