"""Compares the quality of cachedit_fx, cache-dit and fewer steps at equal cost, on the trained digits model.

Every configuration generates the same images from the same noise. The following is measured: the share of the FLOPs of
the uncached model that are executed (counted); PSNR, SSIM and relative L2 to the uncached images; and the share of
images that a classifier recognizes. The configurations next to a PSNR of 45, 40 and 35 dB are then compiled and timed
in alternation with the uncached model. Every family runs in a process of its own with one thread.

    python -m benchmarks.quality --json quality.json --plot quality.svg
    python -m benchmarks.quality --write docs/quality.md         # writes the tables into the page, the plot next to it
    python -m benchmarks.quality --quick                         # a short trial run
    python -m benchmarks.quality --tune tuned                    # tunes first, and measures the results as well
    python -m benchmarks.quality --tuned a.yaml b.yaml --only tuned
    python -m benchmarks.quality --from quality.json --write docs/quality.md    # measures nothing
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import figures, quality_page
from benchmarks.quality_configs import FAMILIES, tuned
from benchmarks.quality_driver import run
from benchmarks.quality_frontier import worth_timing
from benchmarks.quality_plot import draw
from benchmarks.quality_setup import load_setup
from benchmarks.quality_shadow import correlations
from benchmarks.quality_tune import tune_all
from benchmarks.quality_worker import Job

MODULE = "benchmarks.quality"
QUICK = r"^(F1B0 r0\.(12|3) w4, last|euler (8|14))$"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits", help="'digits', or module:factory (see quality_setup.py)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--only", default="", help="a regular expression that a configuration's name must match")
    parser.add_argument("--tuned", nargs="+", default=[], metavar="FILE", help="saved configurations, among ours")
    parser.add_argument(
        "--tune", type=Path, metavar="DIR", help="tune on other digits first, and save the results there"
    )
    parser.add_argument("--images", type=int, default=100, help="digits to generate (100)")
    parser.add_argument("--batch", type=int, default=20, help="digits at once, for the images (20)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes at once, for the images (2); never for the times"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of the times, an image each (10); 0: no times")
    parser.add_argument("--inner", default="inductor", help="what compiles, for the times (inductor)")
    parser.add_argument("--quick", action="store_true", help="a few configurations, ten images, no times")
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--from", type=Path, dest="source", help="such a file, instead of measuring")
    parser.add_argument("--plot", type=Path, help="PSNR over the share of FLOPs: .svg, .png, .pdf")
    parser.add_argument("--write", type=Path, help="a page: the tables between its marks, the plot beside it")
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.batch, args.rounds, args.only = 10, 10, 0, args.only or QUICK
    return args


def names_of(args: argparse.Namespace, family: str, num_steps: int) -> list[str]:
    found = FAMILIES[family](num_steps) + (tuned(args.tuned) if family == "ours" else [])
    return [config.name for config in found if re.search(args.only, config.name)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything: first the images, with the families in parallel; then the times, one after the other."""
    num_steps = load_setup(args.pipeline, 1, 1).num_steps
    measured: dict[str, Any] = {
        "command": figures.command(MODULE),
        "hardware": figures.hardware("cpu"),
        "versions": figures.versions(),
        **{key: getattr(args, key) for key in ("pipeline", "batch", "inner", "rounds")},
        **{"reference": {}, "nearness": [], "times": [], "errors": {}},
    }
    common = {"pipeline": args.pipeline, "num_images": args.images, "batch": args.batch, "tuned": args.tuned}
    common |= {"inner": args.inner, "rounds": args.rounds}
    jobs = [
        Job(family, "nearness", names=names, **common)
        for family in args.families
        if (names := names_of(args, family, num_steps))
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for job, (reference, rows, error) in zip(jobs, pool.map(run, jobs), strict=True):
            measured["reference"] = reference or measured["reference"]
            measured["nearness"] += rows
            measured["errors"] |= {job.family: error} if error else {}
    if "ours" in args.families and not args.quick:
        measured["shadow"] = correlations(args.pipeline)
    for family in args.families if args.rounds else []:
        names = worth_timing(quality_page.rows_of(measured, family))
        if names:
            _, rows, error = run(Job(family, "time", names=names, **common))
            measured["times"] += rows
            measured["errors"] |= {family: error} if error else {}
    return measured


def main() -> None:
    args = parse()
    if args.tune and not args.source:
        args.tuned = [*args.tuned, *tune_all(args.tune)]
    measured = json.loads(args.source.read_text(encoding="utf-8")) if args.source else measure(args)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print("\n" + quality_page.tables(measured))
    plot = args.plot or (args.write.with_suffix(".svg") if args.write else None)
    if plot:
        draw(measured, plot)
    if args.write and plot:
        quality_page.write_page(args.write, measured, plot.name if plot.parent == args.write.parent else None)
    if measured["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
