"""Runs one variant in a process of its own. Reads one command per line, and answers each with a line of JSON.

compile     sets up, and runs generations until none compiles anything; returns the seconds of the compilation
begin       begins a generation
step        runs the next step of the generation; returns seconds
end         checks the generation and ends it
generation  the previous three together; returns the seconds of every step
memory      runs a generation; returns bytes
profile     runs a generation; returns what the device waited for
quit        ends the process
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

from benchmarks.memory import allocated_peak, host_reads, peak_rss_bytes
from benchmarks.variants import VARIANTS, Settings, Variant, raise_limits
from benchmarks.work import denoise_step, latents_of, prompt_of, timesteps_of

Seconds = dict[str, float]
MAX_GENERATIONS = 10  # Until nothing is compiled any more.


class Stopwatch:
    """Measures the time between marks: wall time, CPU time and, on an accelerator, the time between events."""

    def __init__(self, device: str) -> None:
        self._on_device = device != "cpu"
        self._marks: list[tuple[float, float, Any]] = []

    def mark(self) -> None:
        event = None
        if self._on_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((time.perf_counter(), time.process_time(), event))

    def step_times(self) -> list[Seconds]:
        """Returns the times between consecutive marks. Waits for the device."""
        if self._on_device:
            torch.cuda.synchronize()
        found = []
        for (wall, cpu, event), (next_wall, next_cpu, next_event) in zip(self._marks, self._marks[1:], strict=False):
            step_time = {"wall": next_wall - wall, "cpu": next_cpu - cpu}
            if event is not None:
                step_time["gpu"] = event.elapsed_time(next_event) / 1e3
            found.append(step_time)
        return found


class Generation:
    """The loop of one generation, which runs step by step."""

    def __init__(self, variant: Variant, seed: int) -> None:
        self._variant, work, device = variant, variant.work, variant.settings.device
        self._latents: Tensor = latents_of(work, seed, device)
        self._prompt = prompt_of(work, seed, device)
        self._timesteps = timesteps_of(work, device)
        self._step = 0

    def step(self) -> None:
        variant, number = self._variant, self._step
        self._step += 1
        if variant.settings.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            self._latents = denoise_step(
                lambda guidance_branch, inputs: variant.call(guidance_branch, inputs, number),
                variant.work,
                self._prompt,
                self._latents,
                self._timesteps[number],
            )

    def check(self) -> None:
        """Checks that the generation is complete and its result finite."""
        if self._step != self._variant.work.num_steps or not self._latents.isfinite().all():
            raise RuntimeError(f"{self._step} steps of {self._variant.work.num_steps}, or latents that are not finite")


class Worker:
    """A variant and its current generation."""

    def __init__(self, settings: Settings) -> None:
        self.variant = VARIANTS[settings.variant](settings)
        self._device = settings.device
        self._seed = 0
        self._generation: Generation | None = None
        self._num_compilations = 0  # When the last generation that may compile had ended.
        self._min_generations = 4 if settings.mode == "reduce-overhead" else 2  # Graphs are recorded after the first.
        self._state: dict[str, Any] = {}

    def compile(self) -> dict[str, Any]:
        """Returns the seconds of the compilation, including child processes.

        This is the total time less the time that the calls take once they are compiled.
        """
        started = time.perf_counter(), cpu_seconds()
        self.variant.prepare()
        for count in range(1, MAX_GENERATIONS + 1):
            known, before = num_compilations(), (time.perf_counter(), cpu_seconds())
            self._run()
            after = time.perf_counter(), cpu_seconds()
            if count >= self._min_generations and num_compilations() == known:
                break
        else:
            raise RuntimeError(f"generation {MAX_GENERATIONS} still compiles")
        self._num_compilations = known
        wall, cpu = (
            now - start - count * (now - then) for start, then, now in zip(started, before, after, strict=True)
        )
        frames = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        return {"wall": wall, "cpu": cpu, "generations": count, "graphs": frames, **self._state}

    def begin(self) -> dict[str, Any]:
        self._seed += 1
        self._generation = Generation(self.variant, self._seed)
        self.variant.begin()
        self._synchronize()
        return {}

    def step(self) -> Seconds:
        watch = Stopwatch(self._device)
        watch.mark()
        self._running.step()
        watch.mark()
        (step_time,) = watch.step_times()
        return step_time

    def end(self) -> dict[str, Any]:
        """Ends the generation, and returns its decisions and its memory.

        Raises:
            RuntimeError: It reused other steps than expected, holds more memory than expected, or compiled something.
        """
        variant = self.variant
        self._running.check()
        found = variant.decisions()
        wanted = (
            {guidance_branch: variant.expected for guidance_branch in variant.work.guidance_branches}
            if found or variant.caches
            else {}
        )
        if found != wanted:
            raise RuntimeError(f"reused steps {found}, wanted {wanted}")
        during = variant.state_bytes()
        self._generation = None
        variant.end()
        gc.collect()
        after = variant.state_bytes()
        variant.check_state(during, after)
        if self._num_compilations and num_compilations() != self._num_compilations:
            raise RuntimeError("something was compiled during a measured generation")
        self._state = {"reused": found, "state_bytes": during, "state_bytes_after": after}
        return self._state

    def generation(self) -> dict[str, Any]:
        self.begin()
        watch = Stopwatch(self._device)
        watch.mark()
        for _ in range(self.variant.work.num_steps):
            self._running.step()
            watch.mark()
        step_times = watch.step_times()
        return {"steps": step_times, **self.end()}

    def memory(self) -> dict[str, Any]:
        """Returns the bytes of the weights, and the peak that a generation allocated in addition to what there was."""
        peak = allocated_peak(self._run, self._device)
        tensors = [*self.variant.model.parameters(), *self.variant.model.buffers()]
        return {"peak": peak, "weights": sum(t.nbytes for t in tensors), "rss": peak_rss_bytes()}

    def profile(self) -> dict[str, Any]:
        return host_reads(self._run, self._device)

    @property
    def _running(self) -> Generation:
        if self._generation is None:
            raise RuntimeError("no generation has begun")
        return self._generation

    def _run(self) -> None:
        self.begin()
        for _ in range(self.variant.work.num_steps):
            self._running.step()
        self._synchronize()
        self.end()

    def _synchronize(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def num_compilations() -> int:
    """Returns the number of frames that Dynamo has examined; calls of compiled code are not counted."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


def _answer(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        return {"error": f"{type(error).__name__}: {first}"}


def main(worker: Callable[[Settings], Any] = Worker) -> None:
    """Serves the commands from the standard input with a `worker` for the settings."""
    settings = Settings(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    if settings.device == "cpu":
        torch.set_num_threads(1)
    raise_limits()
    made: list[Any] = []

    def start() -> dict[str, Any]:
        made.append(worker(settings))
        return {}

    for line in sys.stdin:
        command = line.strip()
        answer = _answer(start if command == "start" else getattr(made[0], command))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
