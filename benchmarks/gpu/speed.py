"""Measures variants of one work: each in a process, compiled at the same time, and then run in alternation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.driver import Results as Measurements
from benchmarks.figures import Figures
from benchmarks.gpu.processes import Worker, ask
from benchmarks.gpu.records import Results
from benchmarks.gpu.works import GPU_WORKS, weight_bytes
from benchmarks.variants import VARIANTS, Settings, is_installed
from benchmarks.work import Work

BASE = "plain"
Start = Callable[[Settings], Worker]
MOST_SHARE = 0.85  # Of the device's memory, for the processes that hold weights at the same time.
CONTEXT_BYTES = 2 << 30  # Of a process, besides weights and activations.


@dataclass(frozen=True)
class Item:
    """A work in one mode.

    Attributes:
        seconds: The expected duration on a GPU.
        rounds: The number of generations of every variant.
        label: What tells items of one work and mode apart.
    """

    work: str
    mode: str | None = None
    variants: tuple[str, ...] = (BASE, "ours", "floor", "cache-dit", "fbc")
    seconds: float = 70
    rounds: int = 2
    label: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.work, self.mode, self.label)))


_ALL = (
    Item("flux-dev-shallow", rounds=3),
    Item("qwen-image-shallow"),
    Item("wan-1.3b-shallow"),
    Item("wan-14b-shallow", seconds=90),
    Item("flux-dev", seconds=130, variants=(BASE, "ours", "floor")),
    Item("flux-small", seconds=110),
    Item("flux-small", "reduce-overhead", variants=(BASE, "ours", "floor", "cache-dit"), seconds=120),
    Item("flux-dev", seconds=130, variants=(BASE, "cache-dit", "fbc"), label="peers"),
    Item("wan-1.3b", seconds=120, variants=(BASE, "ours", "floor")),
    Item("qwen-image", seconds=200, variants=(BASE, "ours", "floor")),
)
ITEMS = {item.name: item for item in _ALL}


class Bench:
    """The measurement of one item. Everything that is found is written at once.

    Args:
        settings: What is common to all variants: the device, the size and the inner backend.
        start: Starts the worker of a variant.
        results: Where everything goes.
        together: How many processes fit into the memory of the device.
    """

    def __init__(self, item: Item, settings: Settings, start: Start, results: Results, together: int) -> None:
        self.item, self._settings, self._start, self._results = item, settings, start, results
        self.work: Work = GPU_WORKS[item.work].tiny() if settings.is_tiny else GPU_WORKS[item.work]
        installed = [name for name in item.variants if is_installed(name)]
        self.measured = Measurements(installed)
        self._together = max(2, together)
        self.entry: dict[str, Any] = {
            "name": item.name,
            "title": self.work.title,
            "mode": item.mode,
            "mask": self.work.mask,
            "variants": self.measured.variants,
            "errors": self.measured.errors,
            "failed": {},
            "skipped": {name: "not installed" for name in item.variants if name not in installed},
            "figures": {},
        }
        results.data["speed"].append(self.entry)
        self._clock = "cpu" if settings.device == "cpu" else "gpu"

    def run(self, deadline: float) -> None:
        """Measures all variants, as many at a time as fit into the memory, each beside the plain model."""
        names = [name for name in self.measured.variants if name != BASE]
        base, size = self._start_variant(BASE), self._together - 1
        workers: list[Worker] = []
        try:
            for i in range(0, max(1, len(names)), size):
                workers = [self._start_variant(name) for name in names[i : i + size]]
                self._ask([*([base] if i == 0 else []), *workers], "compile", deadline)
                self._alternate(base, [worker for worker in workers if self._runs(worker)], deadline)
                for worker in [*([base] if i == 0 else []), *workers]:
                    for command in ("memory", "gaps"):
                        self._ask([worker], command, deadline)
                for worker in workers:
                    worker.kill()
        finally:
            for worker in [base, *workers]:
                worker.kill()

    def _start_variant(self, name: str) -> Worker:
        return self._start(dataclasses.replace(self._settings, work=self.item.work, variant=name, mode=self.item.mode))

    def _runs(self, worker: Worker) -> bool:
        return worker.name not in self.measured.errors

    def _alternate(self, base: Worker, workers: Sequence[Worker], deadline: float) -> None:
        """Runs generations in alternation with the plain model, which are stored with every variant as `beside`."""
        order = [worker for worker in (base, *workers) if self._runs(worker)]
        for round_ in range(self.item.rounds):
            turn = round_ % max(1, len(order))
            done = {worker.name: self._ask([worker], "generation", deadline) for worker in order[turn:] + order[:turn]}
            for worker in workers:
                if done.get(BASE) is not None and done[worker.name] is not None:
                    self.measured.variants[worker.name].setdefault("beside", []).append(done[BASE])
            self._save()

    def _ask(self, workers: Sequence[Worker], command: str, deadline: float) -> dict[str, Any] | None:
        """Stores the answers. Returns that of the first worker; None if there is none."""
        asked, found = [worker for worker in workers if self._runs(worker)], None
        for name, answer in ask(asked, command, deadline).items():
            if "error" in answer:
                # Times are valid even if what is measured after them fails.
                errors = self.measured.errors if command in ("compile", "generation") else self.entry["failed"]
                errors[name] = f"{command}: {answer['error']}"
                continue
            found = answer["answer"]
            entry = self.measured.variants[name]
            if command in ("compile", "generation"):
                entry["compile" if command == "compile" else "rounds"].append(found)
            else:
                entry[command] = found
        for worker in asked:
            if not self._runs(worker):
                worker.kill()  # Its memory is needed.
        self._save()
        return found

    def _save(self) -> None:
        self.entry["figures"] = {name: self._figures(name) for name in self.measured.variants}
        self._results.write()

    def _figures(self, name: str) -> dict[str, float | None]:
        """Returns what the tables show of a variant; None for what is unknown."""
        figures, entry = Figures(self.work, self.measured, self._clock), self.measured.variants[name]
        found: dict[str, float | None] = {}
        try:
            found |= {
                "computed_ms": figures.step_ms(name, reused=False) if name != "floor" else None,
                "reused_ms": figures.step_ms(name, reused=True),
                "generation_ms": figures.generation_ms(name),
                "computed_to_plain": figures.step(name, BASE, reused=False) if name != "floor" else None,
                "reused_to_floor": figures.step(name, "floor", reused=True),
                "generation_to_plain": figures.generation(name, BASE),
            }
        except (ArithmeticError, ValueError):  # A round is missing.
            found["generation_ms"] = None
        found["compile_s"] = entry["compile"][-1]["wall"] if entry["compile"] and VARIANTS[name].compiles else None
        memory, gaps = entry["memory"] or {}, entry.get("gaps") or {}
        found |= {"peak_bytes": memory.get("in_all"), "beyond_bytes": memory.get("peak")}
        for kind in ("computed", "reused"):
            own, milliseconds = gaps.get(kind, {}), found.get(f"{kind}_ms")
            busy = own.get("busy_us")
            # The profiler slows the host down, so the pauses are those of the steps that were timed without it.
            timed = max(0.0, 1 - busy / 1e3 / milliseconds) if busy and milliseconds else None
            found |= {f"idle_{kind}": timed, f"idle_{kind}_profiled": own.get("idle_share")}
            found |= {f"kernels_{kind}": own.get("kernels"), f"waits_{kind}": own.get("waits")}
        return found


def fits(item: Item, pace: float, deadline: float) -> bool:
    """Whether an item is expected to end before the deadline, if items take `pace` times as long as expected."""
    return time.monotonic() + item.seconds * pace <= deadline


def device_memory(device: str) -> int:
    """Returns the bytes of the memory of the device."""
    return torch.cuda.get_device_properties(0).total_memory if device != "cpu" else 64 << 30


def processes_that_fit(work: Work, total: int) -> int:
    """Returns how many processes with this model fit into `total` bytes of memory, with a third for activations."""
    return int(MOST_SHARE * total / (weight_bytes(work) * 4 / 3 + CONTEXT_BYTES))
