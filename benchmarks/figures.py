"""Computes ratios from measurements, and writes tables with a description of the machine."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.driver import Results
from benchmarks.variants import VARIANTS
from benchmarks.work import Work

PACKAGES = ("torch", "diffusers", "cache-dit", "triton")
CACHE_DIT = ("cache-dit", "cache-dit-regional")
Rows = list[list[str]]


class Figures:
    """Ratios between the variants of one work: medians over rounds, with both sides from the same round.

    Args:
        clock: "cpu" (CPU time of the process), "wall", or "gpu" (time between events on the device).
    """

    def __init__(self, work: Work, results: Results, clock: str) -> None:
        self.work, self.results, self.clock = work, results, clock

    def rounds(self, name: str) -> list[list[float]]:
        """Returns the seconds of each step, by round."""
        return self._seconds(self.results.variants.get(name, {}).get("rounds", []))

    def _seconds(self, rounds: list[dict[str, Any]]) -> list[list[float]]:
        return [[step[self.clock] for step in entry["steps"]] for entry in rounds]

    def has(self, *names: str) -> bool:
        return all(self.rounds(name) and name not in self.results.errors for name in names)

    def step(self, name: str, base: str, *, reused: bool) -> float | None:
        """Returns the ratio of the steps of this kind to the same steps of `base`."""
        if not self.has(name, base) or (reused and not VARIANTS[name].caches and name != "floor"):
            return None
        kind = [i for i, computes in enumerate(self.work.mask) if computes != reused]
        return self._ratio(name, base, lambda mine, theirs: statistics.median(mine[i] / theirs[i] for i in kind))

    def generation(self, name: str, base: str) -> float | None:
        if not self.has(name, base):
            return None
        return self._ratio(name, base, lambda mine, theirs: sum(mine) / sum(theirs))

    def _ratio(self, name: str, base: str, ratio: Callable[[list[float], list[float]], float]) -> float:
        """Returns the median over the rounds in which both alternated, or the ratio of their ratios to "plain"."""
        beside = self.results.variants[name].get("beside")
        if beside is not None and base != "plain":
            return self._ratio(name, "plain", ratio) / self._ratio(base, "plain", ratio)
        theirs = self._seconds(beside) if beside is not None else self.rounds(base)
        return statistics.median(ratio(a, b) for a, b in zip(self.rounds(name), theirs, strict=False))

    def step_ms(self, name: str, *, reused: bool) -> float | None:
        if not self.has(name) or (reused and not VARIANTS[name].caches and name != "floor"):
            return None
        kind = [i for i, computes in enumerate(self.work.mask) if computes != reused]
        return 1e3 * statistics.median(steps[i] for steps in self.rounds(name) for i in kind)

    def generation_ms(self, name: str) -> float | None:
        return 1e3 * statistics.median(map(sum, self.rounds(name))) if self.has(name) else None

    def compile_seconds(self, name: str, kind: str) -> float | None:
        """Returns the seconds of a compilation, with empty caches (`kind` "compile") or filled ones ("warm").

        This is CPU time including child processes, and wall time on a GPU.
        """
        found = self.results.variants.get(name, {}).get(kind, [])
        clock = "wall" if self.clock == "gpu" else "cpu"
        return statistics.median(entry[clock] for entry in found) if found and VARIANTS[name].compiles else None

    def compile_ratio(self, name: str, kind: str, base: str, base_kind: str) -> float | None:
        mine, theirs = (self.results.variants.get(n, {}).get(k, []) for n, k in ((name, kind), (base, base_kind)))
        clock = "wall" if self.clock == "gpu" else "cpu"
        if not mine or not theirs or not VARIANTS[name].compiles:
            return None
        return statistics.median(a[clock] / b[clock] for a, b in zip(mine, theirs, strict=False) if b[clock])

    def memory(self, name: str, kind: str) -> int | None:
        found = self.results.variants.get(name, {}).get("memory")
        return found[kind] if found else None

    def state(self, name: str, kind: str) -> int | None:
        found = self.results.variants.get(name, {}).get("rounds", [])
        return found[-1][kind] if found and VARIANTS[name].caches else None


def time_table(figures: Figures) -> str:
    peers = [name for name in CACHE_DIT if figures.has(name)]
    header = ["variant", "computed step, ms", "/ plain", "reused step, ms", "/ floor", "generation, ms", "/ plain"]
    rows = [[*header, *(f"/ {name}" for name in peers)]]
    for name in figures.results.variants:
        rows.append(
            [
                name,
                _text(figures.step_ms(name, reused=False), 2) if name != "floor" else "-",
                _text(figures.step(name, "plain", reused=False)) if name != "floor" else "-",
                _text(figures.step_ms(name, reused=True), 2),
                _text(figures.step(name, "floor", reused=True)),
                _text(figures.generation_ms(name), 1),
                _text(figures.generation(name, "plain")),
                *(_text(figures.generation(name, peer)) for peer in peers),
            ]
        )
    return markdown(rows)


def cost_table(figures: Figures) -> str:
    seconds = "wall s" if figures.clock == "gpu" else "CPU s"
    rows = [
        [
            "variant",
            f"cold compile, {seconds}",
            "/ plain",
            f"warm start, {seconds}",
            "/ cold",
            "graphs",
            "state, KiB",
            "after, KiB",
            "peak memory, MiB",
            "/ plain",
            "with weights / plain",
        ]
    ]
    for name, entry in figures.results.variants.items():
        peak, plain = figures.memory(name, "peak"), figures.memory("plain", "peak")
        weights, plain_weights = figures.memory(name, "weights"), figures.memory("plain", "weights")
        compiled = entry["compile"][-1] if entry["compile"] else {}
        total = (peak + weights) / (plain + plain_weights) if peak and weights and plain and plain_weights else None
        rows.append(
            [
                name,
                _text(figures.compile_seconds(name, "compile"), 1),
                _text(figures.compile_ratio(name, "compile", "plain", "compile")),
                _text(figures.compile_seconds(name, "warm"), 1),
                _text(figures.compile_ratio(name, "warm", name, "compile")),
                str(compiled.get("graphs", "-")),
                _text(figures.state(name, "state_bytes"), 1, scale=1024),
                _text(figures.state(name, "state_bytes_after"), 1, scale=1024),
                _text(peak, 2, scale=2**20),
                _text(peak / plain if peak and plain else None),
                _text(total if name != "floor" else None),
            ]
        )
    return markdown(rows)


def targets(figures: Figures) -> dict[str, float | None]:
    """Returns the figures that this project aims to improve, by name; None for those that were not measured."""
    peak, plain = figures.memory("ours", "peak"), figures.memory("plain", "peak")
    found = {
        "reused step / floor": figures.step("ours", "floor", reused=True),
        "computed step / plain": figures.step("ours", "plain", reused=False),
        "generation with nothing reused / plain": figures.generation("ours-zero", "plain"),
        "cold compile / plain": figures.compile_ratio("ours", "compile", "plain", "compile"),
        "warm start / cold": figures.compile_ratio("ours", "warm", "ours", "compile"),
    }
    for name in (*CACHE_DIT, "fbc"):
        found[f"generation, same decisions / {name}"] = figures.generation("ours", name)
    found["peak memory beyond weights / plain"] = peak / plain if peak and plain else None
    return found


def target_table(figures: Figures) -> str:
    known = {name: value for name, value in targets(figures).items() if value is not None}
    rows = [["target", "measured"], *([name, _text(value)] for name, value in known.items())]
    state = figures.state("ours", "state_bytes")
    if state is not None:
        rows.append(["state of a generation (as computed from the shapes), and after it", f"{state} bytes, then 0"])
    return markdown(rows)


def notes(names: Sequence[str], errors: dict[str, str]) -> list[str]:
    found = [VARIANTS[name].note for name in names if VARIANTS[name].note]
    return list(dict.fromkeys(found)) + [f"{name} failed: {error}" for name, error in errors.items()]


def markdown(rows: Rows) -> str:
    rule = ["---"] * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _text(value: float | None, digits: int = 3, *, scale: float = 1) -> str:
    return "-" if value is None else f"{value / scale:.{digits}f}"


def hardware(device: str) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    if device == "cpu":
        return f"{name}, 1 thread of {os.cpu_count()}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    import cachedit_fx

    found = {"cachedit_fx": cachedit_fx.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(module: str) -> str:
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def heading(title: str, device: str, module: str, detail: str) -> str:
    """Returns the text above every table."""
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"## {title}\n\n{hardware(device)}; {named}\n{detail}\n`{command(module)}`"
