"""Measures and stores the error of candidates against the uncached pipeline on the given calls."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.tuning.calls import Call
from cachedit_fx.tuning.fit import parts_of
from cachedit_fx.tuning.schedule import Schedule
from cachedit_fx.tuning.simulate import Simulation

_MARGIN_DB = 0.5  # For a single image, whose spread is unknown.
_MOST_DB = 100.0  # Of an image without an error, whose PSNR is infinite and would hide all others in a mean.


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
        """The mean over the images of the PSNR of each, in dB, at most 100 for each."""
        return float(np.mean(self._psnr_of_each))

    @property
    def rel_l2(self) -> float:
        """The mean over the images of |error| / |output|, dimensionless."""
        return float(np.mean(self._rel_l2_of_each))

    @property
    def margin_db(self) -> float:
        """The standard error of the mean PSNR in dB, by which other calls may turn out worse."""
        return _standard_error(self._psnr_of_each) if len(self.errors) > 1 else _MARGIN_DB

    @property
    def margin_rel_l2(self) -> float:
        """The standard error of the mean relative L2 distance, by which other calls may turn out worse."""
        if len(self.errors) == 1:
            return self.rel_l2 * (10 ** (_MARGIN_DB / 20) - 1)
        return _standard_error(self._rel_l2_of_each)

    @property
    def _psnr_of_each(self) -> list[float]:
        return [_psnr(error, self.peak) for error in self.errors]

    @property
    def _rel_l2_of_each(self) -> list[float]:
        pairs = zip(self.errors, self.powers, strict=True)
        return [math.sqrt(error / power if power else error) for error, power in pairs]


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _psnr(error: float, peak: float) -> float:
    return min(_MOST_DB, 10 * math.log10(peak**2 / error)) if error > 0 else _MOST_DB


@dataclass
class Meter:
    """Runs the calls with a candidate and compares their results with the uncached ones.

    Attributes:
        pipe: The pipeline.
        modules: The transformers that the calls run, in the order in which they run, by name.
        calls: The calls to run.
        references: What each call returned without the cache, float32 on the CPU, [images, ...].
        peak: The peak value of the PSNR, in units of the images.
        resume: A JSON file in which the measurements are stored. Those that it already holds are loaded.
        measured: The measurements by the key of their candidate.

    Raises:
        ConfigError: The file `resume` cannot be read, or belongs to other calls or another pipeline.
    """

    pipe: Any
    modules: Mapping[str, nn.Module]
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
            parts = zip(self.modules.values(), parts_of(schedule), strict=True)
            simulations = [Simulation(module, part) for module, part in parts]
            with ExitStack() as stack:
                for simulation in simulations:
                    stack.enter_context(simulation.simulating())
                output = call.run(self.pipe)
            counts[0] += sum(simulation.num_computed for simulation in simulations)
            counts[1] += sum(simulation.num_calls for simulation in simulations)
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
