"""One worker: the checks of one case, or one variant of one work that is measured.

Reads one command per line, and answers as `processes` says.

check       (of a case, or of the environment) runs all checks, and sends a record for each
compile     (of a variant) sets up, and runs generations until none compiles anything
generation  runs a generation; returns the seconds of every step, the decisions and the memory of the cache
memory      runs a generation; returns bytes
gaps        profiles a generation; returns how long the device was idle at computed and at reused steps
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import worker as timed
from benchmarks.gpu import gaps, works
from benchmarks.gpu.cases import Case
from benchmarks.gpu.checks import Checker, Limits
from benchmarks.gpu.environment import EnvironmentWorker
from benchmarks.gpu.records import Emit
from benchmarks.variants import Settings, raise_limits


class CheckWorker:
    """The checks of one case."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._checker = Checker(Case(**spec["case"]), spec["device"], Limits(**spec["limits"]))

    def check(self, emit: Emit) -> dict[str, Any]:
        self._checker.run(emit)
        return {}


class SpeedWorker(timed.Worker):
    """A variant that is measured."""

    def __init__(self, spec: dict[str, Any]) -> None:
        works.register()
        self._is_on_gpu = spec["device"] != "cpu"
        if self._is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        super().__init__(Settings(**spec["settings"]))

    def generation(self) -> dict[str, Any]:
        self._num_compilations = timed.num_compilations()  # Another variant may have compiled in this process.
        return super().generation()

    def memory(self) -> dict[str, Any]:
        """Returns bytes: `peak` beyond what there was before a generation, `weights`, and the most `in_all`."""
        found = super().memory()
        return {**found, "in_all": torch.cuda.max_memory_allocated() if self._is_on_gpu else found["rss"]}

    def gaps(self) -> dict[str, Any]:
        work = self.variant.work
        self.begin()
        events = gaps.profile_steps(lambda _number: self._running.step(), work.num_steps, self._device)
        self.end()
        has_short_steps = self.variant.caches or self.variant.settings.variant == "floor"
        return gaps.summary(gaps.steps_of(events), work.mask if has_short_steps else (1,) * work.num_steps)


def make(spec: dict[str, Any]) -> Any:
    """Makes the worker for a specification."""
    if spec["device"] == "cpu":
        torch.set_num_threads(1)
    if "environment" in spec:
        return EnvironmentWorker(spec["device"], spec["inner"])
    return CheckWorker(spec) if "case" in spec else SpeedWorker(spec)


def answer(made: Any, command: str, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Returns the answer to a command. Sends its records before."""
    try:
        method = getattr(made, command)
        found = method(lambda record: send({"record": record})) if command == "check" else method()
        return {"answer": found}
    except Exception as error:
        traceback.print_exc()
        first = " ".join(str(error).strip().splitlines()[:3])[:400]
        return {"error": f"{type(error).__name__}: {first}"}


def main() -> None:
    spec = json.loads(sys.argv[1])
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to the log.

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    raise_limits()
    made: Any = None
    for line in sys.stdin:
        try:
            made = made or make(spec)
        except Exception as error:
            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {str(error).strip()[:400]}"})
            return
        send(answer(made, line.strip(), send))


if __name__ == "__main__":
    main()
