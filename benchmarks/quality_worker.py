"""Measures one family in a process of its own. Reads a job as JSON, and answers with a line of JSON per configuration.

    echo '{"family": "ours", "task": "nearness", ...}' | python -m benchmarks.quality_worker

The task "nearness" generates the images of every call with the eager backend, and counts the FLOPs. The task "time"
measures the seconds of calls for one image, in alternation with the uncached model compiled by the same backend.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_configs import FAMILIES, Config, tuned_configs
from benchmarks.quality_metrics import nearness
from benchmarks.quality_models import load_setup
from benchmarks.quality_runners import RUNNERS, Runner, UnavailableError, reset
from benchmarks.quality_setup import Setup
from benchmarks.variants import raise_limits

MAX_WARMUPS = 6  # Generations until nothing is compiled any more.


@dataclass(frozen=True)
class Job:
    """The job of a worker.

    Attributes:
        names: The names of the configurations to measure.
        tuned: Further configurations for "ours", by name as `load_configs` accepts them.
        inner: The inner backend for the task "time".
        rounds: The number of rounds of the task "time", each with another image.
    """

    family: str
    task: str
    model: str = "digits"
    num_images: int = 100
    batch: int = 10
    names: list[str] = field(default_factory=list)
    tuned: dict[str, Any] = field(default_factory=dict)
    inner: str = "inductor"
    rounds: int = 5

    def configs(self, setup: Setup) -> list[Config]:
        found = FAMILIES[self.family](setup) + (tuned_configs(self.tuned) if self.family == "ours" else [])
        return [config for config in found if config.name in self.names]

    def runner(self, kind: type[Runner], inner: str = "eager") -> Runner:
        return kind(load_setup(self.model, self.num_images, self.batch), inner)


class NearnessTask:
    """Measures the distance of the images of a configuration to the uncached ones, and the share of the FLOPs."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._runner = job.runner(RUNNERS[job.family])
        base = job.runner(Runner)
        self._numbers = range(len(base.setup.calls))
        self._reference, self._flops = self._all(base)
        self._accuracy = base.setup.accuracy
        self.configs = job.configs(base.setup)

    def reference(self) -> dict[str, Any]:
        """Returns the results of the uncached run."""
        return {"images": len(self._reference), "flops": self._flops, "accuracy": self._read(self._reference)}

    def measure(self, config: Config) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            self._runner.configure(config)
            images, flops = self._all(self._runner)
        except Exception:
            self._runner = self._job.runner(RUNNERS[self._job.family])  # Of the old one nothing is known any more.
            raise
        self._runner.close()
        return {
            "share": flops / self._flops,
            **dataclasses.asdict(nearness(images, self._reference)),
            "accuracy": self._read(images),
            "seconds": time.perf_counter() - started,
        }

    def _all(self, runner: Runner) -> tuple[Tensor, int]:
        """Returns the images of all calls, [N, ..., C, H, W], and the total FLOPs."""
        with runner.counting() as counter:
            images = torch.cat([runner.images(number) for number in self._numbers])
        return images, counter.total

    def _read(self, images: Tensor) -> float | None:
        return None if self._accuracy is None else self._accuracy(images)


class TimeTask:
    """Measures the seconds per call of a configuration in alternation with the uncached model."""

    def __init__(self, job: Job) -> None:
        self._job = dataclasses.replace(job, num_images=job.rounds, batch=1)
        self.configs = job.configs(load_setup(job.model, 1, 1))
        self._compiled: tuple[Runner, Runner] | None = None

    def reference(self) -> dict[str, Any]:
        return {}

    def measure(self, config: Config) -> dict[str, Any]:
        base, mine = self._runners()
        mine.configure(config)
        for runner in (base, mine):
            self._warm_up(runner)
        num_calls = len(base.setup.calls)
        rounds = [tuple(_seconds(each, i % num_calls) for each in (base, mine)) for i in range(self._job.rounds)]
        mine.close()
        clocks = {
            f"{clock}_ratio": statistics.median(mine[i] / base[i] for base, mine in rounds)
            for i, clock in enumerate(("wall", "cpu"))
        }
        milliseconds = [1e3 * statistics.median(pair[side][0] for pair in rounds) for side in (0, 1)]
        return {**clocks, "uncached_ms": milliseconds[0], "ms": milliseconds[1]}

    def _runners(self) -> tuple[Runner, Runner]:
        """Returns the uncached runner and that of the family; new ones if the last configuration left compiled code."""
        kind = RUNNERS[self._job.family]
        if self._compiled is None or not kind.compiles_once:
            reset()
            self._compiled = self._job.runner(Runner, self._job.inner), self._job.runner(kind, self._job.inner)
        return self._compiled

    def _warm_up(self, runner: Runner) -> None:
        """Generates until nothing is compiled any more.

        Raises:
            UnavailableError: Every generation compiles something.
        """
        for _ in range(MAX_WARMUPS):
            known = _num_frames()
            runner.images(0)
            if _num_frames() == known:
                return
        raise UnavailableError(f"generation {MAX_WARMUPS} still compiles")


def _seconds(runner: Runner, number: int) -> tuple[float, float]:
    """Returns the wall and CPU seconds of one call."""
    started = time.perf_counter(), time.process_time()
    runner.images(number)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _num_frames() -> int:
    return int(torch._dynamo.utils.counters["frames"]["total"])


def main() -> None:
    job = Job(**json.load(sys.stdin))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    torch.set_num_threads(1)
    raise_limits()
    task = NearnessTask(job) if job.task == "nearness" else TimeTask(job)
    print(json.dumps({"reference": task.reference()}), file=answers, flush=True)
    for config in task.configs:
        answer: dict[str, Any] = {
            **{"family": config.family, "group": config.group, "name": config.name},
            **{"schedule": config.schedule, "guidance": config.guidance},
        }
        try:
            answer |= task.measure(config)
        except Exception as error:
            if not isinstance(error, UnavailableError):
                traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            answer["skipped"] = first if isinstance(error, UnavailableError) else f"{type(error).__name__}: {first}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
