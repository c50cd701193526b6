"""Compares cachedit_fx with other caches in pipelines of diffusers on a CPU: time, compilation, state and memory.

Every variant runs in a process of its own with one thread, and `pipe(...)` is called as in any use of a pipeline. The
pipelines have no text encoder and no VAE, so the time of a generation is that of the denoising loop. All variants reuse
the same steps of a generation. Each process checks this, that the computed steps before the first reused one equal
those of the plain model up to rounding, and that nothing is compiled during a measurement.

In each process, generations alternate with those of a reference: it runs the plain compiled model at the computed steps
and the floor at the others, so that both find the processor's caches in the same state as a cache does. Between the
processes, generations alternate within a round. The figures are medians of ratios within one round, with quartiles.

    python -m benchmarks.run --work flux-compute qwen --rounds 15 --json out.json
    python -m benchmarks.run --quick          # a trial run with tiny sizes, a few minutes
    python -m benchmarks.run --write-docs     # everything, into README.md, docs/performance.md and .json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import figures, pipeline_tables
from benchmarks.pipeline_driver import Plan, measure
from benchmarks.pipeline_figures import summarize
from benchmarks.pipeline_variants import PIPELINE_VARIANTS, USUAL, is_installed
from benchmarks.sizes import ON_CPU
from benchmarks.variants import Settings

MODULE = "benchmarks.run"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", choices=ON_CPU, default=list(ON_CPU), metavar="NAME", help=", ".join(ON_CPU)
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=PIPELINE_VARIANTS,
        default=list(USUAL),
        metavar="NAME",
        help=", ".join(PIPELINE_VARIANTS),
    )
    parser.add_argument("--rounds", type=int, help="generations of every variant (15)")
    parser.add_argument("--no-warm", action="store_true", help="leave out the warm starts, with filled on-disk caches")
    parser.add_argument("--profile", action="store_true", help="where the time of a step of cachedit_fx goes")
    parser.add_argument("--json", type=Path, help="every time that was measured")
    parser.add_argument("--markdown", type=Path, help="the tables, besides printing them")
    parser.add_argument("--write-docs", action="store_true", help="the tables into the pages; profiles too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds")
    parser.add_argument("--inner", default="inductor", help="the torch.compile backend that compiles (inductor)")
    parser.add_argument("--policy", choices=("dynamic", "static"), default="dynamic", help="of the mask (dynamic)")
    parser.add_argument("--fn", type=int, default=1, help="blocks at the front that always run (1)")
    parser.add_argument("--bn", type=int, default=0, help="blocks at the end that always run (0)")
    return parser.parse_args()


def settings_of(args: argparse.Namespace, work: str) -> list[Settings]:
    """Returns the settings of each variant that can run in this environment."""
    names = [name for name in args.variants if is_installed(name)]
    if args.fn != 1 or args.bn:
        names = [name for name in names if name not in ("fbc", "magcache")]
    common = Settings(work, "", is_tiny=args.quick, inner=args.inner, policy=args.policy, front=args.fn, back=args.bn)
    return [dataclasses.replace(common, variant=name) for name in names]


def main() -> None:
    args = parse()
    rounds = args.rounds or (2 if args.quick else 15)
    plan = Plan(rounds, starts_warm=not args.no_warm, profiles=args.profile or args.write_docs)
    common: dict[str, Any] = {
        "command": figures.command(MODULE),
        "hardware": figures.hardware("cpu"),
        "versions": figures.versions(),
        "rounds": rounds,
        "inner": args.inner,
        "policy": args.policy,
        "fn": args.fn,
        "bn": args.bn,
    }
    written: dict[str, Any] = {**common, "works": {}}
    measured: dict[str, Any] = {**common, "works": {}}
    for work in args.work:
        settings = settings_of(args, work)
        with tempfile.TemporaryDirectory() as cache:
            results = measure(settings, plan, Path(cache))
        written["works"][work] = {"variants": results.variants, "errors": results.errors}
        measured["works"][work] = summarize(settings[0].find_work(), results)
        print("\n" + pipeline_tables.work_section(measured["works"][work]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**written, "summary": measured}) + "\n", encoding="utf-8")
    tables = pipeline_tables.performance(measured)
    print(f"\n{tables}\n\n{pipeline_tables.readme(measured)}")
    if args.markdown:
        args.markdown.write_text(tables + "\n", encoding="utf-8")
    failed = any(work["errors"] for work in measured["works"].values())
    if args.write_docs and not failed:
        pipeline_tables.MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        pipeline_tables.write_pages(measured)
    if failed:
        raise SystemExit("a variant failed")


if __name__ == "__main__":
    main()
