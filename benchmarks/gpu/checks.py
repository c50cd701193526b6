"""The checks of one case: whether the cached model computes what the uncached one does, and what a step costs in waits.

The reference is `by_hand.ByHand`, with the same decisions. With the eager inner backend, outputs must be bitwise equal
to it. With Inductor, the error may be `FACTOR` times that of the eager model in the same dtype. Both errors are
relative to the same weights in a wider dtype (float32 for bfloat16, float64 for float32).
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cachedit_fx
from benchmarks.gpu.by_hand import ByHand, are_equal, relative_error
from benchmarks.gpu.cases import Case
from benchmarks.gpu.counters import count_graph_use, count_host_waits, num_compilations
from benchmarks.gpu.gaps import profile_steps, steps_of
from benchmarks.gpu.records import FAILED, PASSED, SKIPPED, Check, Emit
from benchmarks.variants import THRESHOLD
from benchmarks.work import KINDS, build, latents_of, prompt_of, timesteps_of

FACTOR = 3
Inputs = dict[str, dict[str, Any]]  # By guidance branch.
Outputs = list[Tensor]  # In the order of the calls.
Verdict = tuple[str, str, bool]  # What was expected, what was found, and whether that is right.


class SkipCheck(Exception):
    """Why a check is skipped."""


@dataclass(frozen=True)
class Limits:
    """What a call may cost.

    Attributes:
        waits: How often the host may wait for the device at a call that compares a diff with a threshold.
        static_waits: The same if a mask has decided beforehand.
    """

    waits: int = 1
    static_waits: int = 0


class Checker:
    """Runs the checks of one case."""

    def __init__(self, case: Case, device: str, limits: Limits) -> None:
        self.case, self.device, self.limits = case, device, limits
        self.work = case.find_work()
        self.mask = self.work.mask
        self.inner = "inductor" if case.is_compiled else "eager"

    def run(self, emit: Emit) -> None:
        """Emits one record for every check."""
        with self._inductor_config():
            try:
                self._set_up()
            except Exception as error:
                is_missing = isinstance(error, SkipCheck) or self.case.is_quantized
                why = str(error) if isinstance(error, SkipCheck) else f"the uncached model: {_text(error)}"
                verdict = SKIPPED if is_missing or _is_out_of_memory(error) else FAILED
                for name in CHECKS:
                    emit(Check(self.case.name, name, verdict=verdict, reason=why).as_dict())
                return
            for name, check in CHECKS.items():
                emit(self._made(name, check).as_dict())

    def _made(self, name: str, check: Callable[[Checker], Verdict]) -> Check:
        started, found = time.perf_counter(), functools.partial(Check, self.case.name, name)
        try:
            with torch.no_grad():
                expected, text, is_right = check(self)
        except SkipCheck as why:
            return found(verdict=SKIPPED, reason=str(why))
        except Exception as error:
            verdict = SKIPPED if _is_out_of_memory(error) else FAILED
            return found(found="an error", verdict=verdict, reason=_text(error))
        seconds = round(time.perf_counter() - started, 2)
        return found(expected, text, PASSED if is_right else FAILED, seconds=seconds)

    @contextmanager
    def _inductor_config(self) -> Iterator[None]:
        from torch._inductor import config

        with config.patch({"triton.cudagraphs": True} if self.case.has_global_graphs else {}):
            yield

    def _set_up(self) -> None:
        """Builds the model, and computes the references while it is still uncached."""
        if self.case.is_quantized and self.device == "cpu":
            raise SkipCheck("float8 needs a GPU")
        self.model: Any = build(self.work, self.device)
        dtype = torch.float64 if self.work.dtype == "float32" else torch.float32
        wide = copy.deepcopy(self.model).to(dtype)
        self.wide_off, self.wide_reuse = self._by_hand(wide, 0, (1,) * len(self.mask)), self._by_hand(wide, 0)
        self.wide_other = self._by_hand(wide, 1)
        del wide
        gc.collect()
        if self.case.is_quantized:
            _quantize(self.model, KINDS[self.work.kind].lists)
        self.off, self.reuse = self._by_hand(self.model, 0, (1,) * len(self.mask)), self._by_hand(self.model, 0)
        self.other = self._by_hand(self.model, 1)
        self._enabled: dict[str, Any] | None = None

    def _by_hand(self, model: nn.Module, seed: int, mask: Sequence[int] | None = None) -> Outputs:
        run = ByHand(self.work, model)
        dtype = next(model.parameters()).dtype
        computes = self.mask if mask is None else mask
        return [
            run(guidance_branch, _cast(given, dtype), computes=bool(computes[step]))
            for step, inputs in enumerate(self.inputs(seed))
            for guidance_branch, given in inputs.items()
        ]

    def inputs(self, seed: int) -> Iterator[Inputs]:
        """Yields the inputs of every step of a generation. They do not depend on outputs, whose errors would add up."""
        work, device = self.work, self.device
        prompt, timesteps = prompt_of(work, seed, device), timesteps_of(work, device)
        first, last = latents_of(work, seed, device), latents_of(work, seed + 100, device)
        for step, timestep in enumerate(timesteps):
            latents = torch.lerp(first.float(), last.float(), step / work.num_steps / 4).to(first.dtype)
            common = dict(hidden_states=latents, timestep=timestep, return_dict=False)
            yield {name: {**common, **given} for name, given in prompt.inputs.items()}

    def enable(self, **fields: Any) -> None:
        """Enables the cache, unless it is enabled with these fields."""
        if self._enabled == fields:
            return
        common: dict[str, Any] = dict(
            Fn_compute_blocks=1, max_warmup_steps=1, forecaster=None, on_no_match="raise", inner_backend=self.inner
        )
        mode = {"mode": self.case.mode} if self.case.mode and self.case.is_compiled else {}
        cachedit_fx.enable_cache(self.model, fullgraph=True, **{**common, **mode, **fields})
        self._enabled = fields
        for _ in range(3 if self.case.uses_graphs else 1):  # Graphs are recorded after the first run of a piece.
            self.generation()

    def enable_off(self) -> None:
        self.enable(residual_diff_threshold=0.0)

    def enable_mask(self, policy: str = "dynamic") -> None:
        """Reuses where the mask has a 0. With "dynamic", the diff is compared with a threshold above all diffs."""
        self.enable(
            residual_diff_threshold=THRESHOLD, steps_computation_mask=self.mask, steps_computation_policy=policy
        )

    def call(self, given: dict[str, Any]) -> Tensor:
        output: Tensor = self.model(**given)[0]
        return output

    def generation(self, seed: int = 0) -> Outputs:
        """Returns copies of the outputs of a generation, made after every call."""
        return [self.call(given).clone() for inputs in self.inputs(seed) for given in inputs.values()]

    def decided(self) -> list[list[int]]:
        """Returns the reused steps of every guidance branch of a new generation."""
        cachedit_fx.reset()
        running = self.inputs(0)  # Holds the prompt, whose deletion ends the session.
        for inputs in running:
            for given in inputs.values():
                self.call(given)
            found = [list(entry.cached_steps) for entry in cachedit_fx.summary(self.model, logging=False)]
        return found

    def is_right(self, found: Outputs, eager: Outputs, wide: Outputs) -> Verdict:
        """The verdict on outputs: bitwise equality with the eager inner backend, else a bound on the rounding."""
        if not self.case.is_compiled:
            equal = are_equal(found, eager)
            text = "equal" if equal else f"relative error {relative_error(found, eager):.2e}"
            return "bitwise equality with the eager model", text, equal
        own = relative_error(eager, wide)
        bound = FACTOR * max(own, torch.finfo(getattr(torch, self.work.dtype)).eps)
        error, effect = relative_error(found, wide), relative_error(self.wide_reuse, self.wide_off)
        expected = f"relative error at most {bound:.2e} ({FACTOR} x that of the eager model)"
        return expected, f"{error:.2e}; reuse changes outputs by {effect:.2e}", error <= bound


def check_caching_off(checker: Checker) -> Verdict:
    """With the threshold 0, every step computes, and outputs are those of the uncached model."""
    checker.enable_off()
    return checker.is_right(checker.generation(), checker.off, checker.wide_off)


def check_decisions(checker: Checker) -> Verdict:
    """The steps that the mask names are reused, in every guidance branch."""
    checker.enable_mask()
    wanted = [[i for i, computes in enumerate(checker.mask) if not computes]] * len(checker.work.guidance_branches)
    found = checker.decided()
    return f"reused steps {wanted}", str(found), found == wanted


def check_reuse(checker: Checker) -> Verdict:
    """A generation with reused steps equals one in which residuals are reused by hand."""
    checker.enable_mask()
    return checker.is_right(checker.generation(), checker.reuse, checker.wide_reuse)


def check_generations_in_a_row(checker: Checker) -> Verdict:
    """Another prompt after the first one, and the first one again."""
    checker.enable_mask()
    outputs = [*checker.generation(1), *checker.generation(0)]
    return checker.is_right(outputs, checker.other + checker.reuse, checker.wide_other + checker.wide_reuse)


def check_interleaved_requests(checker: Checker) -> Verdict:
    """Two requests whose steps alternate have the outputs of separate requests."""
    checker.enable_mask()
    outputs: list[Outputs] = [[], []]
    for pair in zip(checker.inputs(0), checker.inputs(1), strict=True):
        for own, inputs in zip(outputs, pair, strict=True):
            own += [checker.call(given).clone() for given in inputs.values()]
    return checker.is_right(
        outputs[0] + outputs[1], checker.reuse + checker.other, checker.wide_reuse + checker.wide_other
    )


def check_kept_outputs(checker: Checker) -> Verdict:
    """Outputs that the caller keeps do not change while other calls run.

    With CUDA graphs, torch.compile may overwrite the outputs of earlier steps, but not those of the step whose begin
    the caller marks. In this check, a step consists of the calls of two requests.
    """
    checker.enable_mask()
    is_marked = checker.case.uses_graphs and checker.device != "cpu"
    changed = 0
    for _ in range(3 if is_marked else 1):  # Such steps are recorded, too.
        kept: list[tuple[Tensor, Tensor]] = []
        copies: list[Outputs] = [[], []]
        for pair in zip(checker.inputs(0), checker.inputs(1), strict=True):
            if is_marked:
                torch.compiler.cudagraph_mark_step_begin()
                kept.clear()
            for own, inputs in zip(copies, pair, strict=True):
                for given in inputs.values():
                    output = checker.call(given)
                    own.append(output.clone())
                    kept.append((output, own[-1]))
            changed += sum(not torch.equal(output, copied) for output, copied in kept)
    eager, wide = checker.reuse + checker.other, checker.wide_reuse + checker.wide_other
    expected, found, is_right = checker.is_right(copies[0] + copies[1], eager, wide)
    return f"no output changes; {expected}", f"{changed} changed; {found}", is_right and not changed


def check_waits(checker: Checker, policy: str, limit: int) -> Verdict:
    """The host waits for the device at most `limit` times per call. The first step, with a new prompt, is left out."""
    checker.enable_mask(policy)
    by_step = []
    for inputs in checker.inputs(0):
        for given in inputs.values():
            with count_host_waits(checker.device) as waits:
                checker.call(given)
            by_step.append(waits.count)
    calls = len(checker.work.guidance_branches)
    mask = [computes for computes in checker.mask for _ in range(calls)]
    found = {
        kind: max(w for w, m in zip(by_step[calls:], mask[calls:], strict=True) if m == computes)
        for kind, computes in (("computed", 1), ("reused", 0))
    }
    text = ", ".join(f"{kind} {count}" for kind, count in found.items())
    profiled = _profiled_waits(checker)
    if profiled is not None:
        text += f"; in a profile at most {profiled:g}"
    return f"at most {limit} per call", text, max(*found.values(), profiled or 0) <= limit


def _profiled_waits(checker: Checker) -> float | None:
    """The most waits of a call after the first step, in a profile; None on a CPU, and if the profile has no kernels."""
    if checker.device == "cpu":
        return None
    steps = checker.inputs(0)

    def run_step(_number: int) -> None:
        for given in next(steps).values():
            checker.call(given)

    found = steps_of(profile_steps(run_step, checker.work.num_steps, checker.device))
    if not any("kernels" in step for step in found):
        return None
    return max(step["waits"] for step in found[1:]) / len(checker.work.guidance_branches)


def check_threshold_waits(checker: Checker) -> Verdict:
    return check_waits(checker, "dynamic", checker.limits.waits)


def check_static_waits(checker: Checker) -> Verdict:
    return check_waits(checker, "static", checker.limits.static_waits)


def check_steady_state(checker: Checker) -> Verdict:
    """Nothing is compiled and no CUDA graph is recorded after the first generations, also with another prompt."""
    checker.enable_mask()
    checker.generation(1)
    before = num_compilations()
    with count_graph_use() as use:
        for seed in (0, 1):
            checker.generation(seed)
    compiled = num_compilations() - before
    text = f"{compiled} frames compiled, {use.recorded} graphs recorded"
    return "none", text, not compiled and not use.recorded


def check_cuda_graphs(checker: Checker) -> Verdict:
    """CUDA graphs run if the mode asks for them, and no weight is copied into their memory."""
    if checker.device == "cpu":
        raise SkipCheck("CUDA graphs need a GPU")
    checker.enable_mask()
    with count_graph_use(checker.model.parameters()) as use:
        checker.generation()
    if not use.is_known:
        raise SkipCheck("this version of torch has no `CUDAGraphNode` to count from")
    calls = checker.work.num_steps * len(checker.work.guidance_branches)
    text = (
        f"{use.replayed / calls:.1f} graphs run per call, {use.copied / calls:.1f} inputs copied per call "
        f"({use.copied_bytes / calls / 2**20:.1f} MiB), {use.copied_weights} weights copied"
    )
    if not checker.case.uses_graphs:
        return "no graphs", text, not use.replayed
    return "graphs run, no weights copied", text, use.replayed > 0 and not use.copied_weights


CHECKS: dict[str, Callable[[Checker], Verdict]] = {
    "caching off": check_caching_off,
    "decisions": check_decisions,
    "reuse": check_reuse,
    "generations in a row": check_generations_in_a_row,
    "interleaved requests": check_interleaved_requests,
    "waits, threshold": check_threshold_waits,
    "steady state": check_steady_state,
    "CUDA graphs": check_cuda_graphs,
    "waits, static mask": check_static_waits,
    "kept outputs": check_kept_outputs,  # The last one: marks of steps are in force until the process ends.
}


def _quantize(model: nn.Module, lists: Sequence[str]) -> None:
    """Quantizes the linear layers of the blocks to float8, weights and activations."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_
    except ImportError as error:
        raise SkipCheck(f"torchao is not installed or lacks float8 ({_text(error)})") from error
    if torch.cuda.get_device_capability() < (8, 9):
        raise SkipCheck("float8 needs a GPU of compute capability 8.9")
    for name in lists:
        quantize_(getattr(model, name), Float8DynamicActivationFloat8WeightConfig())


def _cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and key != "timestep" else value
        for key, value in given.items()
    }


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
