"""Runs one variant of a pipeline in a process of its own. Reads one command per line, and answers with a line of JSON.

compile     sets up, and runs generations until none compiles anything; returns the seconds of the compilation
reference   compiles the plain model and the floor, of which this process has its own
generation  runs a generation of the variant and one of the reference; returns the seconds of both
memory      runs a generation; returns bytes, how many calls fast dispatch served, and the final latents
profile     returns where the time of a step goes
quit        ends the process
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor.config

from benchmarks.memory import allocated_peak, peak_rss_bytes
from benchmarks.pipeline_profile import profile_steps
from benchmarks.pipeline_variants import PIPELINE_VARIANTS, Ours, Reference
from benchmarks.pipelines import Recorder, relative_difference
from benchmarks.variants import Settings
from benchmarks.worker import MAX_GENERATIONS, cpu_seconds, main, num_compilations

MAX_ROUNDING = 1e-3  # Relative L2 difference of the latents after the warm-up; float32 rounding causes about 1e-6.
MEMORY_SEED = 0  # Of the generation whose final latents the variants are compared by.


class PipelineWorker:
    """A variant of a pipeline and, once it is compiled, the reference beside it."""

    def __init__(self, settings: Settings) -> None:
        self._configs = torch._inductor.config.get_config_copy()
        self.variant = PIPELINE_VARIANTS[settings.variant](settings)
        self.work, self._settings = self.variant.work, settings
        self._reference: Reference | None = None
        self._seed = MEMORY_SEED
        self._reused: Any = {}

    def compile(self) -> dict[str, Any]:
        """Returns the seconds of the compilation, including child processes.

        This is the total time less the time that the generations take once they are compiled.
        """
        started = time.perf_counter(), cpu_seconds()
        self.variant.prepare()
        count, last = self._run_until_compiled()
        total = time.perf_counter() - started[0], cpu_seconds() - started[1]
        wall, cpu = (all_ - count * last[clock] for all_, clock in zip(total, ("wall", "cpu"), strict=True))
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        return {"wall": wall, "cpu": cpu, "generations": count, "graphs": graphs}

    def reference(self) -> dict[str, Any]:
        """Compiles the reference with Inductor's own settings, whatever the variant has set, and a shared cache."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "..", "reference")
        now = torch._inductor.config.get_config_copy()
        changed = {name: value for name, value in self._configs.items() if now[name] != value}
        self._reference = Reference(self._settings)
        with torch._inductor.config.patch(changed):
            self._run_until_compiled(is_reference=True)
        return {}

    def generation(self) -> dict[str, Any]:
        """Returns the seconds of a generation of the variant and of the reference, which alternate in who is first.

        Raises:
            RuntimeError: Other steps were reused than expected, the latents after the warm-up differ by more than
                rounding, or something was compiled.
        """
        self._seed += 1
        known, found, latents = num_compilations(), {}, {}
        for name in ("variant", "reference") if self._seed % 2 else ("reference", "variant"):
            found[name], latents[name] = self._run(self._seed, is_reference=name == "reference")
        warmup = self.work.warmup - 1
        difference = relative_difference(latents["variant"][warmup], latents["reference"][warmup])
        if difference > MAX_ROUNDING:
            raise RuntimeError(f"the latents after {warmup + 1} computed steps differ from plain by {difference:.2g}")
        if num_compilations() != known:
            raise RuntimeError("something was compiled during a measured generation")
        return {**found["variant"], "reference": found["reference"], "rounding": difference, "reused": self._reused}

    def memory(self) -> dict[str, Any]:
        """Returns the bytes of the weights, of the cache, and the peak that a generation allocated in addition."""
        variant, state, calls = self.variant, [0], []

        def read_state(step: int) -> None:
            if step == self.work.num_steps - 1:
                state[0] = variant.state_bytes()

        peak = allocated_peak(lambda: self._run(MEMORY_SEED), "cpu")
        self._run(MEMORY_SEED, after_step=read_state)
        after = variant.state_bytes()
        variant.check_state(state[0], after)
        tensors = [tensor for module in variant.modules for tensor in (*module.parameters(), *module.buffers())]
        found: dict[str, Any] = {"state_bytes": state[0], "state_bytes_after": after}
        if isinstance(variant, Ours):
            with variant.watch_dispatch() as calls:
                self._run(MEMORY_SEED)
            found |= {"calls": len(calls), "fast_calls": sum(calls), "why_not_fast": variant.why_not_dispatched()}
        _, latents = self._run(MEMORY_SEED)
        found["latents"] = latents[-1].flatten().tolist()
        return found | {"peak": peak, "weights": sum(t.nbytes for t in tensors), "rss": peak_rss_bytes()}

    def profile(self) -> dict[str, Any]:
        """Returns the milliseconds of the parts of a step; only of cachedit_fx."""
        assert isinstance(self.variant, Ours)
        return profile_steps(
            self.variant, lambda: self._run(MEMORY_SEED), lambda: self._run(MEMORY_SEED, is_reference=True)
        )

    def _run(self, seed: int, *, is_reference: bool = False, after_step: Any = None) -> tuple[dict[str, Any], Any]:
        """Runs a generation; returns its seconds, and the latents after every step. Checks what it reused."""
        gc.collect()
        if is_reference:
            assert self._reference is not None
            recorder = Recorder(self.work, self._reference.pipe, self._reference.before_step)
            return recorder.run(seed), recorder.latents
        variant = self.variant
        recorder = Recorder(self.work, variant.pipe, variant.before_step, after_step or variant.after_step)
        found = recorder.run(seed)
        self._reused = variant.decisions()
        if after_step is None and self._reused != variant.expected:
            raise RuntimeError(f"reused steps {self._reused}, wanted {variant.expected}")
        return found, recorder.latents

    def _run_until_compiled(self, *, is_reference: bool = False) -> tuple[int, dict[str, Any]]:
        """Returns the number of generations, and the seconds of the last, which compiled nothing."""
        for count in range(1, MAX_GENERATIONS + 1):
            known = num_compilations()
            found, _ = self._run(MEMORY_SEED, is_reference=is_reference)
            if count > 1 and num_compilations() == known:
                return count, found
        raise RuntimeError(f"generation {MAX_GENERATIONS} still compiles")


if __name__ == "__main__":
    main(PipelineWorker)
