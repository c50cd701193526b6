"""How far a schedule is from an uncached pipeline on the given calls. What was measured is kept."""

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

_MARGIN_DB = 0.5  # Where a single image tells nothing of the spread.
_MOST_DB = 150.0  # For outputs that are equal: infinity cannot be averaged, nor written as JSON.


@dataclass(frozen=True)
class Measured:
    """The error against the uncached outputs, one entry per image.

    Attributes:
        errors: Mean squared errors.
        powers: Mean squares of the uncached outputs.
        peak: What PSNR is relative to.
        share_computed: Of the steps.
        seconds: Of all calls together.
    """

    errors: tuple[float, ...]
    powers: tuple[float, ...]
    peak: float
    share_computed: float
    seconds: float

    @property
    def psnr(self) -> float:
        """Of the mean squared error over all images, dB."""
        return _psnr(float(np.mean(self.errors)), self.peak)

    @property
    def rel_l2(self) -> float:
        """Root of the mean over all images of |error|^2 / |output|^2."""
        ratios = [error / power if power else error for error, power in zip(self.errors, self.powers, strict=True)]
        return math.sqrt(float(np.mean(ratios)))

    @property
    def margin_db(self) -> float:
        """How much worse other calls may come out: the standard error of the images' PSNR."""
        each = [_psnr(error, self.peak) for error in self.errors]
        return float(np.std(each, ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else _MARGIN_DB


def _psnr(error: float, peak: float) -> float:
    return min(_MOST_DB, 10 * math.log10(peak**2 / error)) if error > 0 else _MOST_DB


@dataclass
class Meter:
    """Runs the calls and compares.

    Attributes:
        references: What each call returned uncached.
        resume: A JSON file of what was measured before.
        measured: By the schedules' keys.

    Raises:
        ConfigError: The file is of other calls or another pipeline, or cannot be understood.
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

    def is_known(self, key: str) -> bool:
        return key in self.measured

    def simulation(self, schedule: Schedule) -> Measured:
        """The calls with the steps of a schedule left out."""
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
        """What is known under this key, or else what comes out of running every call."""
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
        """Tells these calls from others; to few digits, for another machine rounds in another way."""
        return [float(f"{float(reference.double().norm()):.3g}") for reference in self.references]

    def _store(self, path: Path) -> None:
        entries = {
            key: {"errors": m.errors, "share_computed": m.share_computed, "seconds": m.seconds}
            for key, m in self.measured.items()
        }
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps({"references": self._fingerprint, "measured": entries}), encoding="utf-8")
        os.replace(beside, path)  # Whole or not at all, whenever the run is cut off.

    def _load(self, path: Path) -> None:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            of, entries = known["references"], known["measured"]
            powers = tuple(power for reference in self.references for power in _mean_squares(reference))
            found = {
                key: Measured(tuple(e["errors"]), powers, self.peak, e["share_computed"], e["seconds"])
                for key, e in entries.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"cachedit_fx: resume must be a new path or a file that tune wrote, got {str(path)!r}; "
                "give another path"
            ) from error
        if of != self._fingerprint:
            raise ConfigError(
                f"cachedit_fx: resume must be of the same calls and pipeline, got {str(path)!r}, whose outputs have "
                f"the norms {shown(of)} and not {shown(self._fingerprint)}; give another path"
            )
        self.measured = found


def _mean_squares(values: Tensor) -> list[float]:
    """One per image, summed in float64."""
    each: list[float] = values.double().flatten(1).square().mean(1).tolist()
    return each
