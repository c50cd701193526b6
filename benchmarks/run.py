"""Compares cachedit_fx with other caches on a CPU: time of a step and of a generation, compilation, state and memory.

Every variant runs in a process of its own with one thread. All variants reuse the same steps of a generation. Each
process checks this, and that nothing is compiled during a measurement. The variants alternate after every step or every
generation, so that other work on the machine affects all of them equally. The figures are medians of ratios within one
round.

    python -m benchmarks.run --work flux-compute qwen --rounds 15 --json out.json
    python -m benchmarks.run --quick          # a trial run with tiny sizes, a few minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.driver import Plan, Results, measure
from benchmarks.figures import Figures
from benchmarks.sizes import ON_CPU, WORKS
from benchmarks.variants import USUAL, VARIANTS, Settings, is_installed

MODULE = "benchmarks.run"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", choices=WORKS, default=list(ON_CPU), metavar="NAME", help=", ".join(ON_CPU)
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(USUAL), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--rounds", type=int, help="generations of every variant (15)")
    parser.add_argument("--compilations", type=int, default=1, help="cold and warm starts of every variant (1)")
    parser.add_argument("--no-warm", action="store_true", help="leave out the warm starts, with filled on-disk caches")
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--markdown", type=Path, help="the tables, besides printing them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds")
    parser.add_argument("--inner", default="inductor", help="the torch.compile backend that compiles (inductor)")
    parser.add_argument("--policy", choices=("dynamic", "static"), default="dynamic", help="of the mask (dynamic)")
    parser.add_argument("--fn", type=int, default=1, help="blocks at the front that always run (1)")
    parser.add_argument("--bn", type=int, default=0, help="blocks at the end that always run (0)")
    parser.add_argument(
        "--cache-dit-tuning", action="store_true", help="give cache-dit the Inductor settings it prefers"
    )
    return parser.parse_args()


def settings_of(args: argparse.Namespace, work: str) -> list[Settings]:
    """Returns the settings of each variant that can run in this environment."""
    names = [name for name in args.variants if is_installed(name)]
    if args.fn != 1 or args.bn:
        names = [name for name in names if name != "fbc"]
    common = Settings(
        work,
        "",
        is_tiny=args.quick,
        inner=args.inner,
        policy=args.policy,
        front=args.fn,
        back=args.bn,
        compiles_with_peer_tuning=args.cache_dit_tuning,
    )
    return [dataclasses.replace(common, variant=name) for name in names]


def report(args: argparse.Namespace, work: str, results: Results, plan: Plan) -> str:
    """Returns the tables of one work."""
    size = WORKS[work].tiny() if args.quick else WORKS[work]
    mask = "".join(map(str, size.mask))
    detail = (
        f"F{args.fn}B{args.bn}, {size.num_steps} steps of {len(size.guidance_branches)} call(s), 1 = computed: {mask} "
        f"({args.policy}); {plan.rounds} rounds, interleaved by {size.interleave}; compiled by "
        f"{args.inner} from empty caches, {plan.compilations} time(s)"
    )
    cpu, wall = Figures(size, results, "cpu"), Figures(size, results, "wall")
    missing = [
        f"{name}: left out, {'always F1B0' if is_installed(name) else 'not installed'}"
        for name in args.variants
        if name not in results.variants
    ]
    parts = [
        figures.heading(size.title, "cpu", MODULE, detail),
        figures.target_table(cpu),
        "CPU time of the process:",
        figures.time_table(cpu),
        "Wall time:",
        figures.time_table(wall),
        "Compilation, cache state and memory (memory that a generation allocates beyond the weights):",
        figures.cost_table(cpu),
        "\n".join(f"- {note}" for note in [*figures.notes(list(results.variants), results.errors), *missing]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    args = parse()
    plan = Plan(args.rounds or (2 if args.quick else 15), args.compilations, starts_warm=not args.no_warm)
    written: dict[str, Any] = {
        "command": figures.command(MODULE),
        "hardware": figures.hardware("cpu"),
        "versions": figures.versions(),
        "rounds": plan.rounds,
        "works": {},
    }
    reports, failed = [], False
    for work in args.work:
        with tempfile.TemporaryDirectory() as cache:
            results = measure(settings_of(args, work), plan, Path(cache))
        size = WORKS[work].tiny() if args.quick else WORKS[work]
        reports.append(report(args, work, results, plan))
        print("\n" + reports[-1], flush=True)
        written["works"][work] = {
            "title": size.title,
            "mask": size.mask,
            "targets": figures.targets(Figures(size, results, "cpu")),
            "targets_wall": figures.targets(Figures(size, results, "wall")),
            "variants": results.variants,
            "errors": results.errors,
        }
        failed |= bool(results.errors)
        if args.json:
            args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        if args.markdown:
            args.markdown.write_text("\n".join(reports), encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
