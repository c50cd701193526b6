"""The cases that run under both cache-dit and this package, to compare their decisions.

`record.py` runs the cases under cache-dit and writes `recorded/*.json`. `tests/test_peers.py` runs them under this
package. Both use `subject` and `generate`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests.models import FAMILIES, FLUX, QWEN_IMAGE, WAN, Family, Prompt, denoise

RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Case:
    """One or more generations under one configuration.

    Attributes:
        name: Unique within the family.
        family: Key in `FAMILIES`.
        fields: Fields of cache-dit's `DBCacheConfig`, or of its `DBPruneConfig` if `prune` is set.
        num_steps: Number of steps of a generation.
        quirk: Behaviour of cache-dit that should not be copied; empty if both must agree.
        regions: "merged" for one decision over all block lists, "per_list" for one decision per list.
        modifiers: Fields that differ per block list, in execution order; only with "per_list".
        prune: Whether there is a decision per block (DBPrune) instead of one per step.
        taylorseer_order: Order of the forecast of the residual of a reused step; 0 adds the last residual.
        in_pipeline: Whether the family's real pipeline is run, or the plain loop around the transformer.
        generations: Number of generations, with the seeds `seed`, `seed + 1`, ...
        dtype: The dtype of the weights, the prompts and the latents.
    """

    name: str
    family: str
    fields: Mapping[str, Any]
    num_steps: int = 14
    quirk: str = ""
    regions: str = "merged"
    modifiers: tuple[Mapping[str, Any], ...] = ()
    prune: bool = False
    taylorseer_order: int = 0
    in_pipeline: bool = True
    generations: int = 1
    seed: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def as_json(self) -> dict[str, Any]:
        """The case as `recorded/` stores it with its results: every field that differs from its default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: value for name, value in values.items() if value != getattr(type(self), name, None)}
        return json.loads(json.dumps(changed))  # Tuples become lists, as in the file.


def recorded(case: Case) -> dict[str, Any]:
    """The recorded results of cache-dit for `case`.

    `branches[branch][region]` has `cached_steps`, the reused steps in order, and `residual_diffs`, a mapping from the
    step as a string to its diff, for the steps that were probed. A region is "merged", or with `regions="per_list"`
    the name of the list. With `prune`, `cached_steps` are the steps with a pruned block, `pruned_blocks` maps a step
    to its pruned blocks, and the diffs of a step are by block. A step is the number of the branch's call, counted over
    all generations.

    `latents` describes the latents at the end of the last generation: their `shape`, the `first` elements, and the
    mean absolute value `mean_abs`.

    Raises:
        ValueError: The case is not the one that was recorded.
    """
    found = json.loads((RECORDED / f"{case.family}.json").read_text(encoding="utf-8"))["cases"].get(case.name)
    if found is None or found["case"] != case.as_json():
        raise ValueError(f"{case} has changed since it was recorded; run `make peers`")
    return found


def build(case: Case) -> nn.Module:
    """The transformer of the case, always with the same weights."""
    return FAMILIES[case.family].build().to(getattr(torch, case.dtype))


def subject(case: Case, transformer: nn.Module) -> DiffusionPipeline | nn.Module:
    """The object that generates: the pipeline around `transformer`, or `transformer` itself."""
    return FAMILIES[case.family].pipeline(transformer) if case.in_pipeline else transformer


def generate(case: Case, subject: DiffusionPipeline | nn.Module) -> Tensor:
    """The latents at the end of the last generation of the case."""
    family, dtype = FAMILIES[case.family], getattr(torch, case.dtype)
    for seed in range(case.seed, case.seed + case.generations):
        prompt = _in_dtype(family.prompt(seed), dtype)
        latents = family.latents(seed).to(dtype)
        if isinstance(subject, DiffusionPipeline):
            latents = family.generate(subject, prompt, latents, case.num_steps)[-1]
        else:
            with torch.no_grad():
                latents = denoise(partial(_velocity, subject), family, prompt, latents, case.num_steps)
    return latents


def _velocity(transformer: nn.Module, _branch: str, **inputs: Any) -> Tensor:
    return transformer(**inputs)[0]


def _in_dtype(prompt: Prompt, dtype: torch.dtype) -> Prompt:
    def cast(inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    return Prompt(cast(prompt.cond), None if prompt.uncond is None else cast(prompt.uncond))


# The cases. The threshold of every family is one at which about half of the steps after warm-up are reused.

_NEVER_REOPENS = "the accumulated diff counts computed steps too and is never reset, so the cap never re-opens"
_N_PLUS_1 = "without a pipeline a generation ends one call late, which with two calls per step swaps the branches"
_IN_CALLS = "the refresh hint counts calls of the transformer, two per step with separate guidance"
_SWAPPED = "a refresh between the two calls of a step swaps the branches"
_DTYPE = "the diff is computed in the model's dtype"
_COND_DIFFS = "the dynamic threshold of the negative branch comes from the diffs of the other"
_WITHIN_STEP = "a step counts as cached from its first pruned block on, so its other blocks may hit the limit"
_NOT_SUMMED = "pruning sums no diffs, so the accumulated cap has no effect"
_LATE_TAYLOR = "no derivative before the fourth step of a generation, and a forecast is used however bad it was"


def _mask(digits: str) -> list[int]:
    return [int(digit) for digit in digits]


def _case(
    family: Family, name: str, *, quirk: str = "", fields: Mapping[str, Any] | None = None, **others: Any
) -> Case:
    """A case with F1B0, three warm-up steps and the threshold of the family, updated by the given fields."""
    settings = {name: others.pop(name) for name in list(others) if name not in Case.__dataclass_fields__}
    base = dict(Fn_compute_blocks=1, residual_diff_threshold=family.threshold, max_warmup_steps=3)
    return Case(name, family.name, {**base, **settings}, quirk=quirk, **others)


_flux = partial(_case, FLUX)
_qwen = partial(_case, QWEN_IMAGE)
_wan = partial(_case, WAN)

CASES = (
    # The threshold, and the blocks that always run.
    _flux("plain"),
    _qwen("plain"),
    _wan("plain"),
    _flux("other-seed", seed=2, num_steps=20),
    _qwen("other-seed", seed=2, num_steps=20),
    _wan("other-seed", seed=2, num_steps=20, residual_diff_threshold=0.068),
    _flux("f2b0", Fn_compute_blocks=2),
    _flux("f3b2", Fn_compute_blocks=3, Bn_compute_blocks=2),
    _flux("f1b2", Bn_compute_blocks=2),
    _qwen("f2b1", Fn_compute_blocks=2, Bn_compute_blocks=1),
    _wan("f3b1", Fn_compute_blocks=3, Bn_compute_blocks=1, residual_diff_threshold=0.072),
    _wan("f2b2", Fn_compute_blocks=2, Bn_compute_blocks=2),
    _flux("threshold-0", residual_diff_threshold=0.0),
    _flux("threshold-tiny", residual_diff_threshold=1e-3),
    _qwen("threshold-wide", residual_diff_threshold=0.18),
    _wan("threshold-1", residual_diff_threshold=1.0),
    # Warm-up.
    _flux("warmup-0", max_warmup_steps=0),
    _flux("warmup-1", max_warmup_steps=1),
    _wan("warmup-0", max_warmup_steps=0),
    _qwen("warmup-6-interval-2", max_warmup_steps=6, warmup_interval=2),
    _wan("warmup-8-interval-3", max_warmup_steps=8, warmup_interval=3),
    _flux("warmup-all", max_warmup_steps=14),
    # Limits.
    _flux("max-cached-0", max_cached_steps=0),
    _flux("max-cached-3", max_cached_steps=3),
    _wan("max-cached-4", max_cached_steps=4),
    _wan("max-continuous-0", max_continuous_cached_steps=0),
    _flux("max-continuous-1", residual_diff_threshold=0.2, max_continuous_cached_steps=1),
    _qwen("max-continuous-1", residual_diff_threshold=0.16, max_continuous_cached_steps=1),
    _wan("max-continuous-2", residual_diff_threshold=0.115, max_continuous_cached_steps=2, num_steps=20),
    _flux("max-continuous-2", residual_diff_threshold=0.2, max_continuous_cached_steps=2, num_steps=20),
    _flux("max-continuous-2-threshold-1", residual_diff_threshold=1.0, max_continuous_cached_steps=2),
    _flux(
        "max-continuous-2-mask",
        residual_diff_threshold=0.24,
        max_continuous_cached_steps=2,
        steps_computation_mask=_mask("11100100001000"),
    ),
    _wan("both-limits", residual_diff_threshold=1.0, max_continuous_cached_steps=3, max_cached_steps=7),
    # The accumulated diff.
    _flux("accumulated-unreached", max_accumulated_residual_diff_threshold=5.0),
    _wan("accumulated-threshold-1", residual_diff_threshold=1.0, max_accumulated_residual_diff_threshold=0.1),
    _flux(
        "accumulated",
        residual_diff_threshold=0.2,
        max_accumulated_residual_diff_threshold=0.4,
        quirk=_NEVER_REOPENS,
    ),
    _wan("accumulated", max_accumulated_residual_diff_threshold=0.3, quirk=_NEVER_REOPENS),
    _flux("accumulated-0", max_accumulated_residual_diff_threshold=0.0),
    # Masks.
    _flux("mask-dynamic", steps_computation_mask=_mask("11110100010001")),
    _flux("mask-static", steps_computation_mask=_mask("11110100010001"), steps_computation_policy="static"),
    _wan("mask-static", steps_computation_mask=_mask("11101001000101"), steps_computation_policy="static"),
    _qwen("mask-dynamic", steps_computation_mask=_mask("11001000000001")),
    _flux("mask-short-dynamic", steps_computation_mask=_mask("1101001")),
    _qwen("mask-short-static", steps_computation_mask=_mask("110010"), steps_computation_policy="static"),
    _wan("mask-caps-warmup", max_warmup_steps=8, steps_computation_mask=_mask("11001000010000")),
    _flux("mask-does-not-extend-warmup", max_warmup_steps=1, steps_computation_mask=_mask("11110000000001")),
    _flux(
        "mask-static-goes-over-limits",
        steps_computation_mask=_mask("11100010000010"),
        steps_computation_policy="static",
        max_cached_steps=2,
        max_continuous_cached_steps=1,
    ),
    _flux("mask-fast", steps_computation_mask=_mask("11101001001001"), residual_diff_threshold=0.2),
    _qwen(
        "mask-slow",
        num_steps=16,
        steps_computation_mask=_mask("1111111101110011"),
        steps_computation_policy="static",
    ),
    _wan(
        "mask-ultra",
        num_steps=28,
        max_warmup_steps=4,
        steps_computation_mask=_mask("1111001000001000000100000001"),
        residual_diff_threshold=0.2,
    ),
    _flux(
        "mask-medium",
        num_steps=28,
        max_warmup_steps=8,
        steps_computation_mask=_mask("1111110110001100011000110001"),
        steps_computation_policy="static",
    ),
    # Guidance branches.
    _qwen(
        "separate-diffs",
        num_steps=20,
        seed=2,
        residual_diff_threshold=0.105,
        enable_separate_cfg=True,
        cfg_diff_compute_separate=True,
    ),
    _wan("one-diff", enable_separate_cfg=True, cfg_diff_compute_separate=False),
    _qwen("one-diff", enable_separate_cfg=True, cfg_diff_compute_separate=False, Fn_compute_blocks=2, seed=3),
    _wan(
        "one-diff-max-cached",
        enable_separate_cfg=True,
        cfg_diff_compute_separate=False,
        residual_diff_threshold=0.1,
        max_cached_steps=5,
    ),
    # A refresh within a generation, and the end of a generation.
    _flux("refresh-once", force_refresh_step_hint=7),
    _flux("refresh-repeat", force_refresh_step_hint=5, force_refresh_step_policy="repeat", max_warmup_steps=2),
    _flux("refresh-once-limits", force_refresh_step_hint=8, max_cached_steps=2, max_warmup_steps=2),
    _wan("refresh-once", force_refresh_step_hint=14, quirk=_IN_CALLS),
    _qwen("refresh-once", force_refresh_step_hint=7, quirk=_SWAPPED),
    _flux("num-steps", num_inference_steps=14),
    _wan("num-steps", num_inference_steps=14),
    _flux("loop", in_pipeline=False),
    _wan("loop", in_pipeline=False),
    _flux(
        "loop-twice",
        in_pipeline=False,
        generations=2,
        num_inference_steps=14,
        residual_diff_threshold=0.15,
        quirk=_N_PLUS_1,
    ),
    _wan(
        "loop-twice",
        in_pipeline=False,
        generations=2,
        num_inference_steps=14,
        residual_diff_threshold=0.068,
        quirk=_N_PLUS_1,
    ),
    _flux("pipeline-twice", generations=2, num_inference_steps=14, residual_diff_threshold=0.15),
    _wan("pipeline-twice", generations=2),
    # Two block lists with separate decisions.
    _flux("lists", regions="per_list"),
    _flux("lists-other-seed", regions="per_list", seed=2, num_steps=20),
    _flux("lists-b1", regions="per_list", Bn_compute_blocks=1),
    _flux(
        "lists-thresholds",
        regions="per_list",
        modifiers=({"residual_diff_threshold": 0.1}, {"residual_diff_threshold": 0.17}),
    ),
    _flux(
        "lists-modified",
        regions="per_list",
        modifiers=(
            {"Fn_compute_blocks": 2, "max_continuous_cached_steps": 1, "residual_diff_threshold": 0.2},
            {"Bn_compute_blocks": 1, "max_warmup_steps": 6, "residual_diff_threshold": 0.13},
        ),
    ),
    # One decision per block.
    _flux("prune", prune=True, residual_diff_threshold=0.13),
    _flux("prune-other-seed", prune=True, residual_diff_threshold=0.17, seed=3),
    _qwen("prune", prune=True, residual_diff_threshold=0.068),
    _wan("prune", prune=True, residual_diff_threshold=0.128),
    _wan("prune-other-seed", prune=True, residual_diff_threshold=0.156, seed=3),
    _flux("prune-f2b1", prune=True, residual_diff_threshold=0.17, seed=3, Fn_compute_blocks=2, Bn_compute_blocks=1),
    _flux("prune-kept-blocks", prune=True, residual_diff_threshold=0.17, seed=3, non_prune_block_ids=[3, 5]),
    _wan("prune-kept-blocks", prune=True, residual_diff_threshold=0.156, seed=3, non_prune_block_ids=[2, 9]),
    _flux("prune-max-continuous-1", prune=True, residual_diff_threshold=0.2, max_continuous_cached_steps=1),
    _wan("prune-mask", prune=True, steps_computation_mask=_mask("11101001001001"), steps_computation_policy="static"),
    _flux("prune-lists", prune=True, regions="per_list", residual_diff_threshold=0.115, seed=3),
    _flux("prune-dynamic", prune=True, residual_diff_threshold=0.07, enable_dynamic_prune_threshold=True),
    _flux(
        "prune-dynamic-max",
        prune=True,
        residual_diff_threshold=0.07,
        enable_dynamic_prune_threshold=True,
        max_dynamic_prune_threshold=0.125,
        dynamic_prune_threshold_relax_ratio=1.1,
    ),
    _wan(
        "prune-dynamic",
        prune=True,
        residual_diff_threshold=0.06,
        enable_dynamic_prune_threshold=True,
        max_dynamic_prune_threshold=0.19,
        quirk=_COND_DIFFS,
    ),
    _wan("prune-max-cached", prune=True, residual_diff_threshold=0.156, seed=3, max_cached_steps=3, quirk=_WITHIN_STEP),
    _flux(
        "prune-accumulated",
        prune=True,
        residual_diff_threshold=0.25,
        max_accumulated_residual_diff_threshold=0.1,
        quirk=_NOT_SUMMED,
    ),
    # Forecasts of the residual.
    _flux("taylorseer-1", taylorseer_order=1, max_warmup_steps=4),
    _wan("taylorseer-2", taylorseer_order=2, max_warmup_steps=5),
    _wan("taylorseer-early", taylorseer_order=1, max_warmup_steps=2, quirk=_LATE_TAYLOR),
    _flux(
        "taylorseer-limits",
        taylorseer_order=1,
        num_steps=10,
        Bn_compute_blocks=1,
        residual_diff_threshold=1.0,
        max_warmup_steps=3,
        max_continuous_cached_steps=2,
        quirk=_LATE_TAYLOR,
    ),
    # Precision.
    # In float32 the diff at step 9 is 0.11545; in bfloat16 it is 0.1157, and no longer below the threshold.
    _flux("bfloat16", dtype="bfloat16", residual_diff_threshold=0.1155, quirk=_DTYPE),
)
