"""The configurations that are compared, in families. To try another configuration, add it to `ours`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.quality_solvers import Solvers, calls_of
from cachedit_fx import steps_mask

THRESHOLDS = (0.08, 0.12, 0.2, 0.3, 0.5)
MASKS = ("slow", "medium", "fast", "ultra")
SHARES = (0.21, 0.25, 0.32, 0.39, 0.5, 0.6, 0.7)  # Of the steps that a mask computes.
# By what reports call them: class in cachedit_fx.forecasters and its fields; None repeats the last value.
FORECASTERS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "last": None,
    "Taylor 1": ("TaylorSeerCalibratorConfig", {"taylorseer_order": 1}),
    "Taylor 2": ("TaylorSeerCalibratorConfig", {"taylorseer_order": 2}),
    "FoCa": ("FoCaCalibratorConfig", {}),
    "DMD": ("DMDCalibratorConfig", {}),
    "poly 1": ("PolynomialCalibratorConfig", {"order": 1, "by": "timestep"}),
    "poly 2": ("PolynomialCalibratorConfig", {"order": 2, "by": "timestep"}),
}
# The same of cache-dit.
CALIBRATORS: dict[str, tuple[str, dict[str, Any]] | None] = {
    name: FORECASTERS[name] for name in ("last", "Taylor 1", "Taylor 2", "FoCa", "DMD")
}
# When the guidance branch that is called second computes. By what reports call it: fields for a number of steps.
GUIDANCE: dict[str, Callable[[int], dict[str, Any]]] = {
    "one diff": lambda steps: {"cfg_diff_compute_separate": False},
    "guided": lambda steps: {"guidance_reuse": "difference"},
    "guided every 2nd": lambda steps: {"guidance_reuse": "difference", "max_continuous_guidance_steps": 1},
    "guided every 2nd after a quarter": lambda steps: _guided_after(steps // 4),
    "guided every 2nd after half": lambda steps: _guided_after(steps // 2),
    **{f"guided below {limit:g}": lambda steps, limit=limit: _guided_below(limit) for limit in (0.3, 0.5)},
}


class Pipeline(Protocol):
    """What the configurations depend on; see `quality_setup.Setup`."""

    @property
    def num_steps(self) -> int: ...

    @property
    def is_guided(self) -> bool: ...

    @property
    def solvers(self) -> Solvers: ...


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
        schedule: The name without the forecaster: configurations of one schedule compute the same steps.
        guidance: The key of `GUIDANCE` that is in the fields; empty if there is none.
    """

    family: str
    group: str
    name: str
    fields: Mapping[str, Any] = field(hash=False)
    forecaster: tuple[str, Mapping[str, Any]] | None = field(default=None, hash=False)
    schedule: str = ""
    guidance: str = ""


Row = tuple[str, str, dict[str, Any]]  # Schedule, forecaster, fields.


def ours(pipeline: Pipeline) -> list[Config]:
    """Returns thresholds, preset masks, evenly spaced masks and guidance reuse, with forecasters that may suit them."""
    steps = pipeline.num_steps
    rows = [*_thresholds(), *_presets(steps), *_masks(steps), *_probes()]
    found = [_ours(*row) for row in rows]
    if pipeline.is_guided:
        found += [
            _ours(schedule, which, fields | GUIDANCE[guidance](steps), guidance)
            for guidance in GUIDANCE
            for schedule, which, fields in _for_guidance(steps)
            if not (
                "steps_computation_mask" in fields and guidance.startswith("guided below")
            )  # A mask measures no residual diff.
        ]
    return found


def _ours(schedule: str, which: str, fields: dict[str, Any], guidance: str = "") -> Config:
    name = ", ".join(filter(None, (schedule, which, guidance)))
    return Config("ours", which, name, fields, FORECASTERS[which], schedule, guidance)


def _thresholds() -> Iterator[Row]:
    for warmup, forecasters in ((4, ("last", "Taylor 2", "FoCa")), (8, tuple(FORECASTERS)), (None, ("FoCa",))):
        for threshold in THRESHOLDS:
            for which in forecasters:
                yield f"F1B0 r{threshold:g} w{warmup or '≤8'}", which, _limits(threshold, warmup)
    for warmup in (4, 8):
        for most in (1, 2):
            yield f"F1B0 r1 w{warmup} c{most}", "FoCa", _limits(1.0, warmup) | {"max_continuous_cached_steps": most}
    yield "F1B0 r0.08 w0", "last", _limits(0.08, 0)


def _limits(threshold: float, warmup: int | None) -> dict[str, Any]:
    return {"Fn_compute_blocks": 1, "residual_diff_threshold": threshold, "max_warmup_steps": warmup}


def _presets(num_steps: int) -> Iterator[Row]:
    for policy in MASKS:
        yield f"F0B0 mask {policy}", "FoCa", static(steps_mask(total_steps=num_steps, mask_policy=policy))


def _masks(num_steps: int) -> Iterator[Row]:
    """Yields masks of the package's own, with a forecast of what the blocks add or of the output of the model."""
    output = {"reach": "output", "probe": "none"}
    for count in dict.fromkeys(max(round(share * num_steps), 3) for share in SHARES):
        even, early = static(even_mask(num_steps, count)), static(early_mask(num_steps, count))
        for which in FORECASTERS if count <= num_steps / 2 else ():
            yield f"blocks {count} even", which, even
        for which in ("Taylor 2", "FoCa", "poly 2"):
            yield f"output {count} even", which, even | output
            yield f"output {count} early", which, early | output


def _probes() -> Iterator[Row]:
    for threshold in (0.08, 0.12, 0.2, 0.3):
        for which in ("poly 1", "FoCa"):
            fields = _limits(threshold, 3) | {"Fn_compute_blocks": 0, "probe": "modulated_input", "reach": "output"}
            yield f"output, modulated budget {threshold:g}", which, fields | {"decision_rule": "budget"}


def _for_guidance(num_steps: int) -> Iterator[Row]:
    for threshold in (0.12, 0.2, 0.3):
        yield f"F1B0 r{threshold:g} w8", "FoCa", _limits(threshold, 8)
    for name, which, fields in _masks(num_steps):
        if name in (f"output {round(share * num_steps)} early" for share in (0.6, 0.7)) and which != "Taylor 2":
            yield name, which, fields


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


def early_mask(num_steps: int, num_computed: int) -> list[int]:
    """Returns a mask whose first half of the computed steps are the first steps; the others are evenly spaced."""
    first = num_computed // 2
    gap = (num_steps - first) / (num_computed - first)
    computed = {*range(first), *(first - 1 + round(i * gap) for i in range(1, num_computed - first + 1))}
    return [int(step in computed) for step in range(num_steps)]


def _guided_after(first: int) -> dict[str, Any]:
    return {"guidance_reuse": "difference", "guidance_computation_mask": (1,) * first + (0, 1) * 50}


def _guided_below(limit: float) -> dict[str, Any]:
    return {"guidance_reuse": "difference", "guidance_reuse_threshold": limit}


def cache_dit(pipeline: Pipeline) -> list[Config]:
    """Returns the documented configurations of cache-dit.

    These are F1B0 and F8B0 with several thresholds and warm-ups, masks, and calibrators.
    """
    found: list[Row] = []
    for threshold in THRESHOLDS:
        rows = [(1, warmup, which) for warmup in (4, 8) for which in CALIBRATORS]
        rows += [(1, 0, which) for which in ("last", "Taylor 1", "Taylor 2")]
        if threshold in (0.08, 0.2, 0.5):
            rows += [(8, 4, which) for which in ("last", "Taylor 1", "Taylor 2")]
        for front, warmup, which in rows:
            fields = _limits(threshold, warmup) | {"Fn_compute_blocks": front}
            found.append((f"F{front}B0 r{threshold:g} w{warmup}", which, fields))
    for policy in MASKS:
        for kind, threshold in (("static", 0.08), ("dynamic", 0.2)):
            for which in CALIBRATORS:
                fields = _limits(threshold, 8) | {
                    "steps_computation_mask": steps_mask(total_steps=pipeline.num_steps, mask_policy=policy),
                    "steps_computation_policy": kind,
                }
                found.append((f"F1B0 mask {policy} {kind}", which, fields))
    rows_ = ((name, which, fields | {"Bn_compute_blocks": 0}) for name, which, fields in found)
    return [
        Config("cache-dit", which, f"{name}, {which}", fields, CALIBRATORS[which], name)
        for name, which, fields in rows_
    ]


def fewer_steps(pipeline: Pipeline) -> list[Config]:
    """Returns every solver with every number of calls of the model up to that of the uncached run."""
    found = []
    for name in pipeline.solvers:
        for steps in range(3, 11) if name == "heun" else (4, 5, 6, 8, 10, 12, 14, 16, 20, 24):
            if calls_of(name, steps) < pipeline.num_steps:
                found.append(Config("fewer steps", name, f"{name} {steps}", {"solver": name, "num_steps": steps}))
    return found


def tuned_configs(tuned: Mapping[str, Any]) -> list[Config]:
    """Returns saved configurations, given by name as what `load_configs` accepts."""
    return [
        Config("ours", "tuned", f"tuned {name}", {"load": saved}, guidance="tuned" * ("guidance_reuse" in str(saved)))
        for name, saved in tuned.items()
    ]


FAMILIES: dict[str, Callable[[Pipeline], list[Config]]] = {
    "ours": ours,
    "cache-dit": cache_dit,
    "fewer steps": fewer_steps,
}
