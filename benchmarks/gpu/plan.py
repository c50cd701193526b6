"""The order of a run, within its time: checks, measurements at reduced depth, at full depth, and what was left out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import CASES, Case
from benchmarks.gpu.checks import CHECKS, Limits
from benchmarks.gpu.processes import Local, Message, Process, Task, Worker, run_pool
from benchmarks.gpu.records import FAILED, SKIPPED, Check, Results
from benchmarks.gpu.speed import ITEMS, Bench, Item, device_memory, fits, processes_that_fit
from benchmarks.gpu.works import GPU_WORKS, register
from benchmarks.variants import Settings

ENVIRONMENT = "environment"  # The name of the case that checks the machine.
ENVIRONMENT_CHECKS = ("versions", "device", "compiler", "several devices")
ENVIRONMENT_SECONDS = 30.0
CHECK_SHARE = 0.45  # Of the time, for the checks that run before the measurements,
OVERTIME = 60.0  # and the seconds after that in which they may still end.
LEAST_LIMIT = 120.0  # Seconds after which a worker has hung. Imports may take long while others compile.


class Run:
    """One run of the benchmark.

    Args:
        args: The arguments of the command line.
        deadline: When everything has to be finished, as a value of `time.monotonic`.
        folder: The folder of the caches and logs of the workers.
    """

    def __init__(self, args: argparse.Namespace, results: Results, deadline: float, folder: Path) -> None:
        self._args, self._results, self._deadline, self._folder = args, results, deadline, folder
        self._began = time.monotonic()
        self._is_local = args.in_process
        self.cases = [self._adapted(CASES[name]) for name in args.cases]
        self._pace = 1.0  # How many times as long as expected the last measurement took, at least 1.
        register()

    def _adapted(self, case: Case) -> Case:
        is_compiled = case.is_compiled and self._args.inner == "inductor"
        return dataclasses.replace(case, is_tiny=case.is_tiny or self._args.tiny, is_compiled=is_compiled)

    def run(self) -> None:
        share = CHECK_SHARE if self._args.items else 1.0
        until = self._began + share * (self._deadline - self._began)
        left_out = self._check([self._environment(), *map(self._task, self.cases)], until)
        for name in self._args.items:
            self._measure(ITEMS[name])
        for task in self._check(left_out, self._deadline):
            self.skip_rest(task.name, self._no_time(task.seconds))

    def skip_all(self, why: str) -> None:
        """Gives every check a verdict that has none."""
        for name in (ENVIRONMENT, *(case.name for case in self.cases)):
            self.skip_rest(name, why)

    def skip_rest(self, case: str, why: str, *, first: str = "") -> None:
        """Records the checks of a case that have no record as skipped.

        Args:
            first: The error with which the first of them failed; empty if none did.
        """
        known = {check["name"] for check in self._results.data["checks"] if check["case"] == case}
        for name in ENVIRONMENT_CHECKS if case == ENVIRONMENT else CHECKS:
            if name in known:
                continue
            verdict = FAILED if first else SKIPPED
            self._results.add_check(Check(case, name, verdict=verdict, reason=first or why))
            first = ""

    # Checks

    def _environment(self) -> Task:
        spec = {"environment": True, "device": self._args.device, "inner": self._args.inner}
        return self._task_of(ENVIRONMENT, spec, ENVIRONMENT_SECONDS)

    def _task(self, case: Case) -> Task:
        limits = dataclasses.asdict(Limits(self._args.waits, self._args.static_waits))
        spec = {"case": dataclasses.asdict(case), "device": self._args.device, "limits": limits}
        return self._task_of(case.name, spec, 0.0 if self._is_local else case.seconds)

    def _task_of(self, name: str, spec: dict[str, Any], seconds: float) -> Task:
        limit = max(LEAST_LIMIT, 3 * seconds)
        return Task(name, lambda: self._start(name, spec, Path("checks") / name), "check", seconds, limit)

    def _check(self, tasks: Sequence[Task], start_until: float) -> list[Task]:
        """Runs cases, several at a time, since their times are not compared. Returns those that do not fit."""
        jobs = 1 if self._is_local else self._args.jobs
        deadline = min(self._deadline, start_until + OVERTIME)
        keep = self._results.add_check
        return run_pool(tasks, jobs, start_until, deadline, lambda _name, record: keep(record), self._ended)

    def _ended(self, task: Task, message: Message, seconds: float) -> None:
        error = str(message.get("error", ""))
        if error:
            is_excused = "out of memory" in error or message.get("is_out_of_time")
            why = error if is_excused else "the worker had ended"
            self.skip_rest(task.name, why, first="" if is_excused else error)
        verdicts = [check["verdict"] for check in self._results.data["checks"] if check["case"] == task.name]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
        print(f"check {task.name}: {counts} ({seconds:.0f} s){' - ' + error if error else ''}", flush=True)
        self._results.add_item(f"check {task.name}", task.seconds, seconds, error)

    # Measurements

    def _measure(self, item: Item) -> None:
        if not self._is_local and not fits(item, self._pace, self._deadline):
            self._results.add_item(item.name, item.seconds, 0.0, self._no_time(item.seconds * self._pace))
            print(f"measure {item.name}: {self._no_time(item.seconds * self._pace)}", flush=True)
            return
        started, args = time.monotonic(), self._args
        wanted = tuple(name for name in item.variants if name in args.variants)
        item = dataclasses.replace(item, variants=wanted, rounds=args.rounds or item.rounds)
        settings = Settings(item.work, "plain", args.device, args.tiny, args.inner)
        note = ""
        try:
            together = 99 if args.tiny else processes_that_fit(GPU_WORKS[item.work], device_memory(args.device))
            bench = Bench(item, settings, lambda s: self._variant(item, s), self._results, together)
            bench.run(min(self._deadline, started + max(60.0, 2.5 * item.seconds)))
            errors = [*bench.measured.errors.items(), *bench.entry["failed"].items()]
            note = "; ".join(f"{name}: {error}" for name, error in errors)
        except Exception as error:  # The other items are measured nevertheless.
            note = f"{type(error).__name__}: {str(error)[:400]}"
        seconds = time.monotonic() - started
        self._pace = max(1.0, seconds / item.seconds)
        print(f"measure {item.name}: {seconds:.0f} s{' - ' + note if note else ''}", flush=True)
        self._results.add_item(item.name, item.seconds, seconds, note)

    def _variant(self, item: Item, settings: Settings) -> Worker:
        folder = Path("speed") / item.name / settings.variant
        spec = {"settings": dataclasses.asdict(settings), "device": settings.device}
        return self._start(settings.variant, spec, folder)

    def _start(self, name: str, spec: dict[str, Any], folder: Path) -> Worker:
        if self._is_local:
            from benchmarks.gpu.worker import make

            return Local(name, lambda: make(spec))
        threads = {"OMP_NUM_THREADS": "1"} if self._args.device == "cpu" else {}
        # Inductor starts as many processes as there are cores, for every worker.
        compilers = str(max(1, (os.cpu_count() or 1) // max(1, min(4, self._args.jobs))))
        threads["TORCHINDUCTOR_COMPILE_THREADS"] = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", compilers)
        return Process(name, spec, self._folder / folder, environment=threads)

    def _no_time(self, seconds: float) -> str:
        return f"no time: {seconds:.0f} s expected, {max(0.0, self._deadline - time.monotonic()):.0f} s left"
