"""Compile time, and a computed and a reused step, of FLUX with random weights: ours beside plain torch.compile.

Every variant runs in a process of its own with an empty Inductor cache and one thread; steps are asked for in turn, so
that what else the machine does falls on all of them alike. Figures are medians of per-round ratios.

    python benchmarks/run.py --double 6 --single 12 --width 384 --rounds 30 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

VARIANTS = ("plain", "repeated", "once", "inline", "floor")
Times = dict[str, float]


class Process:
    """A worker, asked over its standard input."""

    def __init__(self, variant: str, arguments: list[str], cache: str) -> None:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        worker = str(Path(__file__).with_name("worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, worker, variant, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, command: str) -> Times:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended at {command!r}; its error stands above")
        answer: Times = json.loads(line)
        return answer

    def quit(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("quit\n")
        self._process.stdin.close()
        self._process.wait()


def measure(arguments: list[str], rounds: int, cache: str) -> dict[str, Any]:
    """Seconds per variant: `compile`, and lists of `computed` and `reused`, one per round."""
    workers, results = {}, {}
    for variant in tqdm(VARIANTS, desc="compile", unit="variant"):  # One after the other: they would share the cores.
        workers[variant] = Process(variant, arguments, f"{cache}/{variant}")
        results[variant] = {"compile": workers[variant].ask("compile"), "computed": [], "reused": []}
    for _ in tqdm(range(rounds), desc="steps", unit="round"):
        for variant, worker in workers.items():
            results[variant]["computed"].append(worker.ask("computed"))
            results[variant]["reused"].append(worker.ask("reused"))
    for worker in workers.values():
        worker.quit()
    return results


def ratio(results: dict[str, Any], kind: str, variant: str, base: str, base_kind: str) -> float:
    """Median over the rounds of the CPU time of one against another in the same round."""
    pairs = zip(results[variant][kind], results[base][base_kind], strict=True)
    return statistics.median(a["cpu"] / b["cpu"] for a, b in pairs)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| variant | cold compile, CPU s | / plain | computed step / plain | reused step / floor | reused step, ms |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        cpu = results[variant]["compile"]["cpu"]
        cells = [variant, f"{cpu:.1f}", f"{cpu / results['plain']['compile']['cpu']:.2f}"]
        caches = variant in ("once", "inline")
        cells.append(f"{ratio(results, 'computed', variant, 'plain', 'computed'):.3f}" if variant != "floor" else "-")
        cells.append(f"{ratio(results, 'reused', variant, 'floor', 'reused'):.3f}" if caches else "-")
        milliseconds = 1e3 * statistics.median(t["cpu"] for t in results[variant]["reused"])
        cells.append(f"{milliseconds:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, 1 thread of {os.cpu_count()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--double", type=int, default=6)
    parser.add_argument("--single", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arguments = [str(args.double), str(args.single), str(args.width)]
    with tempfile.TemporaryDirectory() as cache:
        results = measure(arguments, args.rounds, cache)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "cachedit_fx"))
    print(f"\nFLUX {args.double}+{args.single} blocks, width {args.width}, {args.rounds} rounds")
    print(f"{hardware()}; {versions}; {' '.join(['python', *sys.argv])}\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps({"argv": sys.argv, "hardware": hardware(), "versions": versions, **results}))


if __name__ == "__main__":
    main()
