"""Measures and stores the error of candidates against the uncached pipeline on the given calls."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.schedule import Schedule
from cachedit_fx.tuning.simulate import Simulation

_MARGIN_DB = 0.5  # For a single image, whose spread is unknown.
_MOST_DB = 150.0  # For equal outputs, because infinity can neither be averaged nor written as JSON.


@dataclass(frozen=True)
class Measured:
    """The measured errors against the uncached outputs.

    Attributes:
        errors: The mean squared error of each image.
        powers: The mean square of each uncached image.
        peak: The peak value of the PSNR, in units of the images.
        share_computed: The share of the steps that was computed, from 0 to 1.
        seconds: The time of all calls together.
    """

    errors: tuple[float, ...]
    powers: tuple[float, ...]
    peak: float
    share_computed: float
    seconds: float

    @property
    def psnr(self) -> float:
        """The PSNR of the mean squared error over all images, in dB, at most 150."""
        return _psnr(float(np.mean(self.errors)), self.peak)

    @property
    def rel_l2(self) -> float:
        """The square root of the mean over all images of |error|^2 / |output|^2, dimensionless."""
        ratios = [error / power if power else error for error, power in zip(self.errors, self.powers, strict=True)]
        return math.sqrt(float(np.mean(ratios)))

    @property
    def margin_db(self) -> float:
        """The standard error of the PSNR of the images in dB, by which other calls may turn out worse."""
        each = [_psnr(error, self.peak) for error in self.errors]
        return float(np.std(each, ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else _MARGIN_DB


def _psnr(error: float, peak: float) -> float:
    return min(_MOST_DB, 10 * math.log10(peak**2 / error)) if error > 0 else _MOST_DB


@dataclass
class Meter:
    """Runs the calls with a candidate and compares their results with the uncached ones.

    Attributes:
        pipe: The pipeline.
        module: The transformer of the pipeline.
        calls: The calls to run.
        references: What each call returned without the cache, float32 on the CPU, [images, ...].
        peak: The peak value of the PSNR, in units of the images.
        resume: A JSON file in which the measurements are stored. Those that it already holds are loaded.
        measured: The measurements by the key of their candidate.

    Raises:
        ConfigError: The file `resume` cannot be read, or belongs to other calls or another pipeline.
    """

    pipe: Any
    module: nn.Module
    calls: Sequence[Call]
    references: Sequence[Tensor]
    peak: float
    resume: Path | None = None
    measured: dict[str, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.resume is not None and self.resume.exists():
            self._load(self.resume)

    def is_measured(self, key: str) -> bool:
        return key in self.measured

    def simulation(self, schedule: Schedule) -> Measured:
        """Measures the calls with the model skipped at the reused steps of a schedule."""
        counts = [0, 0]

        def run(call: Call) -> Tensor:
            simulation = Simulation(self.module, schedule)
            with simulation.simulating():
                output = call.run(self.pipe)
            counts[0] += simulation.num_computed
            counts[1] += simulation.num_calls
            return output

        return self.measure(schedule.key, run, lambda: counts[0] / counts[1])

    def measure(self, key: str, run: Callable[[Call], Tensor], share_computed: Callable[[], float]) -> Measured:
        """Returns the measurement that is stored under `key`, or runs every call and stores the result.

        Args:
            key: The key of the candidate.
            run: Runs one call with the candidate and returns its images.
            share_computed: Returns the share of computed steps after all calls have run.
        """
        if key in self.measured:
            return self.measured[key]
        errors: list[float] = []
        powers: list[float] = []
        seconds = 0.0
        for call, reference in zip(self.calls, self.references, strict=True):
            start = time.perf_counter()
            output = run(call)
            seconds += time.perf_counter() - start
            errors += _mean_squares(output - reference)
            powers += _mean_squares(reference)
        found = Measured(tuple(errors), tuple(powers), self.peak, share_computed(), seconds)
        self.measured[key] = found
        if self.resume is not None:
            self._store(self.resume)
        return found

    @property
    def _fingerprint(self) -> list[float]:
        """Identifies the calls by the norms of their results, to three digits because rounding differs by machine."""
        return [float(f"{float(reference.double().norm()):.3g}") for reference in self.references]

    def _store(self, path: Path) -> None:
        entries = {
            key: {"errors": m.errors, "share_computed": m.share_computed, "seconds": m.seconds}
            for key, m in self.measured.items()
        }
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps({"references": self._fingerprint, "measured": entries}), encoding="utf-8")
        os.replace(partial, path)  # Atomic, in case the run is interrupted.

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            of, entries = content["references"], content["measured"]
            powers = tuple(power for reference in self.references for power in _mean_squares(reference))
            found = {
                key: Measured(tuple(e["errors"]), powers, self.peak, e["share_computed"], e["seconds"])
                for key, e in entries.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"cachedit_fx: resume must be a new path or a file that tune wrote, got {str(path)!r}; "
                "pass another path"
            ) from error
        if of != self._fingerprint:
            raise ConfigError(
                f"cachedit_fx: resume must belong to the same calls and pipeline, got {str(path)!r}, whose outputs "
                f"have the norms {shown(of)} instead of {shown(self._fingerprint)}; pass another path"
            )
        self.measured = found


def _mean_squares(values: Tensor) -> list[float]:
    """Returns the mean square of each image, summed in float64."""
    each: list[float] = values.double().flatten(1).square().mean(1).tolist()
    return each
