"""Measures the variants of one pipeline in alternation, each in a process of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.driver import Process, Results
from benchmarks.pipeline_variants import PIPELINE_VARIANTS
from benchmarks.variants import Settings

WORKER = "benchmarks.pipeline_worker"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The number of measurements.

    Attributes:
        rounds: The number of generations of every variant, which alternate.
        starts_warm: Whether each cold start is followed by a warm start, in a new process with the filled caches.
        profiles: Whether the steps of cachedit_fx are profiled.
    """

    rounds: int
    starts_warm: bool = True
    profiles: bool = False


def measure(settings: Sequence[Settings], plan: Plan, cache: Path) -> Results:
    """Measures the variants of one work.

    The variants compile one after the other, because they would share the cores. Then their generations alternate. A
    variant that fails is not measured further.
    """
    names = [each.variant for each in settings]
    results, workers = Results(names), {}
    for each in tqdm(settings, desc="compile", unit="variant"):
        worker = results.attempt(each.variant, lambda each=each: _start(each, plan, cache, results))
        if worker is not None:
            workers[each.variant] = worker
    for round_ in tqdm(range(plan.rounds), desc="rounds", unit="round"):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            if name in workers:
                answer = results.attempt(name, lambda name=name: workers[name].ask("generation"))
                if answer is not None:
                    results.variants[name]["rounds"].append(answer)
    for name, worker in workers.items():
        results.variants[name]["memory"] = results.attempt(name, lambda worker=worker: worker.ask("memory"))
        if plan.profiles and name == "ours":
            results.variants[name]["profile"] = results.attempt(name, lambda worker=worker: worker.ask("profile"))
        worker.quit()
    return results


def _start(settings: Settings, plan: Plan, cache: Path, results: Results) -> Process:
    """Starts a worker that compiles with empty caches, and then measures another one with the filled caches."""
    folder, entry = cache / settings.variant, results.variants[settings.variant]
    shutil.rmtree(folder, ignore_errors=True)
    cold = Process(settings, folder, module=WORKER)
    entry["compile"].append(cold.ask("compile"))
    if plan.starts_warm and PIPELINE_VARIANTS[settings.variant].compiles:
        warm = Process(settings, folder, module=WORKER)
        entry["warm"].append(warm.ask("compile"))
        warm.quit()
    cold.ask("reference")
    return cold
