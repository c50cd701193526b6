"""Runs workers in alternation, so that the variants that are compared are measured at the same time."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.variants import Settings

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
        module: The module that the process runs.
    """

    def __init__(
        self, settings: Settings, cache: Path, deadline: float | None = None, module: str = "benchmarks.worker"
    ) -> None:
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
            [sys.executable, "-m", module, json.dumps(dataclasses.asdict(settings))],
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
