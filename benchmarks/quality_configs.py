"""The configurations that are compared, in families. To try another configuration, add it to `ours`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality_solvers import SOLVERS, calls_of
from cachedit_fx import steps_mask

THRESHOLDS = (0.04, 0.08, 0.12, 0.2, 0.3, 0.5)
MASKS = ("slow", "medium", "fast", "ultra")
# By what reports call them: class in cachedit_fx.forecasters and its fields; None repeats the last value.
FORECASTERS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "last": None,
    "Taylor 1": ("TaylorSeerCalibratorConfig", {"taylorseer_order": 1}),
    "Taylor 2": ("TaylorSeerCalibratorConfig", {"taylorseer_order": 2}),
    "FoCa": ("FoCaCalibratorConfig", {}),
    "DMD": ("DMDCalibratorConfig", {}),
    "poly 1": ("PolynomialCalibratorConfig", {"order": 1, "by": "timestep"}),
    "poly 2": ("PolynomialCalibratorConfig", {"order": 2, "by": "timestep"}),
    "poly 3": ("PolynomialCalibratorConfig", {"order": 3, "by": "timestep"}),
}
# The same of cache-dit.
CALIBRATORS: dict[str, tuple[str, dict[str, Any]] | None] = {
    name: FORECASTERS[name] for name in ("last", "Taylor 1", "Taylor 2", "FoCa", "DMD")
}


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        family: The key of its family in `FAMILIES`.
        group: The group within the family that has a frontier of its own: the forecaster, or the solver.
        name: Its name, unique in the family.
        fields: For "ours", arguments of `enable_cache` in addition to cache-dit's defaults; for "cache-dit", fields of
            its `DBCacheConfig`; for "fewer steps", `solver` and `num_steps`.
        forecaster: The class and the fields of the forecaster; None if there is none.
    """

    family: str
    group: str
    name: str
    fields: Mapping[str, Any] = field(hash=False)
    forecaster: tuple[str, Mapping[str, Any]] | None = field(default=None, hash=False)


def ours(num_steps: int) -> list[Config]:
    """Returns thresholds, preset masks and evenly spaced masks, with every forecaster that may suit them."""
    found = [*_ours_thresholds(), *_ours_masks(num_steps), *_ours_outputs(num_steps), *_ours_probes()]
    return [Config("ours", which, f"{name}, {which}", fields, FORECASTERS[which]) for name, which, fields in found]


Row = tuple[str, str, dict[str, Any]]  # Name without the forecaster, forecaster, fields.


def _ours_thresholds() -> Iterator[Row]:
    for threshold in THRESHOLDS:
        for warmup, forecasters in ((0, ("last",)), (4, tuple(FORECASTERS)), (8, ("last",))):
            for which in forecasters:
                fields = {"Fn_compute_blocks": 1, "residual_diff_threshold": threshold, "max_warmup_steps": warmup}
                yield f"F1B0 r{threshold:g} w{warmup}", which, fields


def _ours_masks(num_steps: int) -> Iterator[Row]:
    for policy in MASKS:
        for which in FORECASTERS:
            yield f"F0B0 mask {policy}", which, static(steps_mask(total_steps=num_steps, mask_policy=policy))


def _ours_outputs(num_steps: int) -> Iterator[Row]:
    masks = {policy: steps_mask(total_steps=num_steps, mask_policy=policy) for policy in MASKS}
    masks |= {f"{count} even": even_mask(num_steps, count) for count in (6, 7, 8, 9, 11, 14) if count < num_steps}
    for name, mask in masks.items():
        for which in ("Taylor 1", "Taylor 2", "poly 1", "poly 2", "poly 3"):
            yield f"output, mask {name}", which, static(mask) | {"reach": "output", "probe": "none"}


def _ours_probes() -> Iterator[Row]:
    for threshold in (0.08, 0.12, 0.2, 0.3):
        for reach in ("blocks", "output"):
            for which in ("last", "poly 1", "poly 2"):
                fields = {
                    **{"Fn_compute_blocks": 0, "residual_diff_threshold": threshold, "max_warmup_steps": 3},
                    **{"probe": "modulated_input", "reach": reach, "decision_rule": "budget"},
                }
                yield f"{reach}, modulated budget {threshold:g}", which, fields


def static(mask: Sequence[int]) -> dict[str, Any]:
    return {
        "Fn_compute_blocks": 0,
        "steps_computation_mask": list(mask),
        "steps_computation_policy": "static",
        "max_warmup_steps": 0,
    }


def even_mask(num_steps: int, num_computed: int) -> list[int]:
    """Returns a mask that computes the first two steps, the last one, and others as evenly spaced as possible."""
    ends = num_steps - 1
    between = [1 + round(i * (ends - 1) / (num_computed - 2)) for i in range(num_computed - 1)]
    computed = {0, *between}
    return [int(step in computed) for step in range(num_steps)]


def cache_dit(num_steps: int) -> list[Config]:
    """Returns the documented configurations of cache-dit.

    These are F1B0 and F8B0 with several thresholds and warm-ups, masks, and calibrators.
    """
    found: list[Row] = []
    for threshold in THRESHOLDS:
        rows = [(1, 4, which) for which in CALIBRATORS]
        rows += [(1, warmup, which) for warmup in (0, 8) for which in ("last", "Taylor 1", "Taylor 2")]
        if threshold in (0.08, 0.2, 0.5):
            rows += [(8, 4, which) for which in ("last", "Taylor 1", "Taylor 2")]
        for front, warmup, which in rows:
            fields: dict[str, Any] = {
                "Fn_compute_blocks": front,
                "residual_diff_threshold": threshold,
                "max_warmup_steps": warmup,
            }
            found.append((f"F{front}B0 r{threshold:g} w{warmup}", which, fields))
    for policy in MASKS:
        for kind, threshold in (("static", 0.08), ("dynamic", 0.2)):
            for which in CALIBRATORS:
                fields = {
                    **{"Fn_compute_blocks": 1, "residual_diff_threshold": threshold, "max_warmup_steps": 8},
                    "steps_computation_mask": steps_mask(total_steps=num_steps, mask_policy=policy),
                    "steps_computation_policy": kind,
                }
                found.append((f"F1B0 mask {policy} {kind}", which, fields))
    rows_ = ((name, which, fields | {"Bn_compute_blocks": 0}) for name, which, fields in found)
    return [Config("cache-dit", which, f"{name}, {which}", fields, CALIBRATORS[which]) for name, which, fields in rows_]


def fewer_steps(num_steps: int) -> list[Config]:
    """Returns every solver with every number of calls of the model up to that of the uncached run."""
    found = []
    for name in SOLVERS:
        for steps in range(3, 11) if name == "heun" else (4, 5, 6, 8, 10, 12, 14, 16, 20, 24):
            if calls_of(name, steps) < num_steps:
                found.append(Config("fewer steps", name, f"{name} {steps}", {"solver": name, "num_steps": steps}))
    return found


def tuned(paths: Sequence[str]) -> list[Config]:
    """Returns saved configurations, as `load_configs` reads them."""
    return [Config("ours", "tuned", f"tuned {Path(path).stem}", {"load": str(path)}) for path in paths]


FAMILIES: dict[str, Callable[[int], list[Config]]] = {"ours": ours, "cache-dit": cache_dit, "fewer steps": fewer_steps}
