"""Runs workers in alternation, so that the variants that are compared are measured at the same time."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.variants import VARIANTS, Settings

ROOT = Path(__file__).resolve().parent.parent
Answer = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker could not carry out a command."""


class OutOfTimeError(WorkerError):
    """A worker exceeded its deadline and was terminated."""


class Process:
    """A worker process, which receives commands through its standard input.

    Args:
        cache: The folder of Inductor's on-disk caches; empty for a cold start.
        deadline: The deadline as a value of `time.monotonic`, in seconds; None for no limit.
    """

    def __init__(self, settings: Settings, cache: Path, deadline: float | None = None) -> None:
        self.settings, self.deadline = settings, deadline
        environment = {
            "CACHE_DIT_LOG_LEVEL": "error",
            "CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS": "1",  # One decision for both block lists, as everywhere here.
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        if settings.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout or sys.stdin, selectors.EVENT_READ)
        self.ask("start")

    def ask(self, command: str) -> Answer:
        """Sends a command and returns the answer of the worker.

        Raises:
            WorkerError: The worker answered with an error, or ended.
            OutOfTimeError: The worker did not answer before the deadline.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"the worker had ended before {command!r}") from error
        wait = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        if not self._selector.select(wait):
            self.kill()
            raise OutOfTimeError(f"out of time at {command!r}")
        line = self._process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"error": f"the worker ended at {command!r}"}
        if "error" in answer:
            self.kill()
            raise WorkerError(answer["error"])
        return answer

    def quit(self) -> None:
        if self._process.poll() is None and self._process.stdin:
            self._process.stdin.close()  # Its end is the end of the worker.
            self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Results:
    """The results of every variant of one work: `compile`, `warm`, `rounds`, `memory` and so on, and the `errors`."""

    def __init__(self, variants: Sequence[str]) -> None:
        self.variants: dict[str, dict[str, Any]] = {
            name: {"compile": [], "warm": [], "rounds": [], "memory": None} for name in variants
        }
        self.errors: dict[str, str] = {}

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Returns the result of `action`; None if it fails. Its error is stored, and it is not measured further."""
        if name in self.errors:
            return None
        try:
            return action()
        except WorkerError as error:
            self.errors[name] = str(error)
            print(f"\n{name}: {error}", file=sys.stderr)
            return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The number of measurements.

    Attributes:
        rounds: The number of generations of every variant, which alternate.
        compilations: The number of cold starts of every variant.
        starts_warm: Whether each cold start is followed by a warm start, in a new process with the filled caches.
    """

    rounds: int
    compilations: int = 1
    starts_warm: bool = True


def measure(settings: Sequence[Settings], plan: Plan, cache: Path) -> Results:
    """Measures the variants of one work on a CPU, each in a process of its own.

    The variants compile one after the other, because they would share the cores. Then their steps or generations
    alternate.
    """
    names = [each.variant for each in settings]
    results, workers = Results(names), {}
    for round_ in range(plan.compilations):
        for each in tqdm(settings, desc=f"compile {round_ + 1}/{plan.compilations}", unit="variant"):
            stale = workers.pop(each.variant, None)
            if stale is not None:
                stale.quit()
            worker = results.attempt(each.variant, lambda each=each: _start(each, plan, cache, results))
            if worker is not None:
                workers[each.variant] = worker
    interleave = _by_step if settings[0].find_work().interleave == "step" else _by_generation
    for round_ in tqdm(range(plan.rounds), desc="rounds", unit="round"):
        turn = round_ % len(names)
        order = [name for name in names[turn:] + names[:turn] if name in workers and name not in results.errors]
        interleave(settings[0].find_work().num_steps, order, workers, results)
    for name, worker in workers.items():
        results.variants[name]["memory"] = results.attempt(name, lambda worker=worker: worker.ask("memory"))
        worker.quit()
    return results


def _start(settings: Settings, plan: Plan, cache: Path, results: Results) -> Process:
    """Starts a worker that compiles with empty caches, and then measures another one with the filled caches."""
    folder, entry = cache / settings.variant, results.variants[settings.variant]
    shutil.rmtree(folder, ignore_errors=True)
    cold = Process(settings, folder)
    entry["compile"].append(cold.ask("compile"))
    if plan.starts_warm and VARIANTS[settings.variant].compiles:
        warm = Process(settings, folder)
        entry["warm"].append(warm.ask("compile"))
        warm.quit()
    return cold


def _by_generation(_steps: int, order: Sequence[str], workers: dict[str, Process], results: Results) -> None:
    for name in order:
        answer = results.attempt(name, lambda name=name: workers[name].ask("generation"))
        if answer is not None:
            results.variants[name]["rounds"].append(answer)


def _by_step(steps: int, order: Sequence[str], workers: dict[str, Process], results: Results) -> None:
    """Like `_by_generation`, but the variants alternate at every step."""
    step_times: dict[str, list[Answer]] = {name: [] for name in order}
    for name in order:
        results.attempt(name, lambda name=name: workers[name].ask("begin"))
    for _ in range(steps):
        for name in order:
            step_time = results.attempt(name, lambda name=name: workers[name].ask("step"))
            if step_time is not None:
                step_times[name].append(step_time)
    for name in order:
        answer = results.attempt(name, lambda name=name: workers[name].ask("end"))
        if answer is not None:
            results.variants[name]["rounds"].append({"steps": step_times[name], **answer})
