"""Compares cachedit_fx with other caches on a GPU: time, memory and waits of the device for the host.

The models have the sizes of published ones and random weights: FLUX.1-dev, Wan 2.1 1.3B, and a small FLUX that is bound
by dispatch. The small one is compiled as usual and once more with CUDA graphs (mode="reduce-overhead"). Nothing is
downloaded.

Plain torch.compile runs in one process. The other variants run one after another in a second process, and the two
processes alternate after every generation. Variants that do not fit into `--minutes` are omitted and listed. The JSON
file is written again after every variant.

    python -m benchmarks.gpu --minutes 9 --json gpu.json
    python -m benchmarks.gpu --device cpu --tiny          # a dry run
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.driver import OutOfTimeError, Process, Results, WorkerError
from benchmarks.figures import Figures
from benchmarks.sizes import ON_GPU, WORKS
from benchmarks.variants import VARIANTS, Settings, is_installed
from benchmarks.work import Work

MODULE = "benchmarks.gpu"
BASE = "plain"
ORDER = ("ours", "cache-dit", "repeated", "fbc", "eager", "cache-dit-regional", "ours-zero", "floor")  # By interest.
WITH_GRAPHS = ("ours", "cache-dit", "fbc", "floor")
RESERVE = 5.0  # Seconds kept for the tables.


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", choices=WORKS, default=list(ON_GPU), metavar="NAME", help=", ".join(ON_GPU)
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(ORDER), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--rounds", type=int, default=2, help="generations of every variant (2)")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (9)")
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--markdown", type=Path, help="the tables, besides printing them")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a dry run")
    parser.add_argument("--inner", default="inductor", help="the torch.compile backend that compiles (inductor)")
    return parser.parse_args()


class Bench:
    """The benchmark of one work in one mode, with a deadline."""

    def __init__(self, args: argparse.Namespace, work: str, mode: str | None, deadline: float, cache: Path) -> None:
        self.args, self.name, self.mode, self.deadline, self.cache = args, work, mode, deadline, cache
        wanted = [name for name in args.variants if name != BASE and is_installed(name)]
        if mode is not None:
            wanted = [name for name in wanted if name in WITH_GRAPHS]
        self.results = Results([BASE, *wanted])
        self.size: Work = WORKS[work].tiny() if args.tiny else WORKS[work]
        self.skipped: list[str] = []

    def run(self, after_each: Callable[[], None]) -> None:
        """Measures as many variants as the time allows; calls `after_each` after every new result."""
        base = self.results.attempt(BASE, self._baseline)
        after_each()
        for name in list(self.results.variants)[1:]:
            if BASE in self.results.errors or time.monotonic() + self._expected_seconds() > self.deadline:
                self._skip(name)
                continue
            try:
                self._beside(name, base)
            except OutOfTimeError:
                self.deadline = time.monotonic()  # Whichever of the two it was: no other is begun.
                self._skip(name)
            except WorkerError as error:
                self.results.errors[name] = str(error)
            after_each()
        if base is not None:
            base.kill()

    def _start(self, name: str) -> Process:
        args = self.args
        settings = Settings(self.name, name, device=args.device, is_tiny=args.tiny, inner=args.inner, mode=self.mode)
        process = Process(settings, self.cache / name, self.deadline)
        self.results.variants[name]["compile"].append(process.ask("compile"))
        return process

    def _baseline(self) -> Process:
        process = self._start(BASE)
        self.results.variants[BASE]["rounds"].append(process.ask("generation"))
        self._alone(BASE, process)
        return process

    def _beside(self, name: str, base: Process) -> None:
        """Runs generations of this variant and of the baseline in alternation, and stores both with this variant."""
        process = self._start(name)
        entry = self.results.variants[name]
        entry["beside"] = []
        try:
            for _ in range(self.args.rounds):
                entry["beside"].append(base.ask("generation"))
                entry["rounds"].append(process.ask("generation"))
            self.results.variants[BASE]["rounds"] += entry["beside"]
            self._alone(name, process)
        finally:
            process.kill()

    def _alone(self, name: str, process: Process) -> None:
        """Measures the memory, and profiles the device, without the baseline."""
        entry = self.results.variants[name]
        entry["memory"] = process.ask("memory")
        entry["profile"] = process.ask("profile")

    def _skip(self, name: str) -> None:
        self.skipped.append(name)
        del self.results.variants[name]

    def _expected_seconds(self) -> float:
        """Returns the expected seconds of the next variant.

        These are half of the compilation time of the baseline, and the generations of both.
        """
        entry = self.results.variants[BASE]
        generation = sum(step["wall"] for step in entry["rounds"][0]["steps"])
        return float(entry["compile"][0]["wall"]) / 2 + (2 * self.args.rounds + 5) * generation + RESERVE

    def report(self) -> str:
        """Returns the tables."""
        size, device = self.size, self.args.device
        mask = "".join(map(str, size.mask))
        detail = (
            f"F1B0, {size.num_steps} steps of {len(size.guidance_branches)} call(s), 1 = computed: {mask} (dynamic); "
            f"mode {self.mode or 'default'}, compiled by {self.args.inner}; {self.args.rounds} rounds, each variant in "
            f"turn with {BASE}: ratios to others are quotients of the ratios to {BASE}"
        )
        found = Figures(size, self.results, "cpu" if device == "cpu" else "gpu")
        notes = figures.notes(list(self.results.variants), self.results.errors)
        notes += [f"{name}: left out, no time" for name in self.skipped]
        parts = [
            figures.heading(size.title, device, MODULE, detail),
            figures.target_table(found),
            "Time between events on the device:" if device != "cpu" else "CPU time of the process (dry run):",
            figures.time_table(found),
            "Compilation, cache state and memory (memory that a generation allocates beyond the weights):",
            figures.cost_table(found),
            "What the device waited for, in a profile of one generation:",
            profile_table(self.results),
            "\n".join(f"- {note}" for note in notes),
        ]
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        found = Figures(self.size, self.results, "cpu" if self.args.device == "cpu" else "gpu")
        return {
            "title": self.size.title,
            "mode": self.mode,
            "mask": self.size.mask,
            "targets": figures.targets(found),
            "variants": self.results.variants,
            "errors": self.results.errors,
            "skipped": self.skipped,
        }


def profile_table(results: Results) -> str:
    columns = {
        "host reads": "reads",
        "pause after one, µs": "bubble_us",
        "share of the time": "bubbles_share",
        "pause between kernels, µs": "other_pause_us",
        "idle in all": "idle_share",
    }
    rows = [["variant", *columns]]
    for name, entry in results.variants.items():
        found = entry.get("profile") or {}
        rows.append([name, *(f"{found[key]:.3g}" if key in found else "-" for key in columns.values())])
    return figures.markdown(rows)


def main() -> None:
    args = parse()
    end = time.monotonic() + 60 * args.minutes
    modes = [(work, None) for work in args.work] + [(work, "reduce-overhead") for work in args.work if "small" in work]
    written: dict[str, Any] = {
        "command": figures.command(MODULE),
        "hardware": figures.hardware(args.device),
        "versions": figures.versions(),
        "works": [],
    }
    reports = []
    for i, (work, mode) in enumerate(modes):
        deadline = time.monotonic() + (end - time.monotonic()) / (len(modes) - i)  # Its share of what is left.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            bench = Bench(args, work, mode, deadline, Path(cache))

            def save(bench: Bench = bench) -> None:
                if args.json:
                    now = {**written, "works": [*written["works"], bench.as_json()]}
                    args.json.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")

            bench.run(save)
        written["works"].append(bench.as_json())
        reports.append(bench.report())
        print("\n" + reports[-1], flush=True)
        if args.markdown:
            args.markdown.write_text("\n".join(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
