"""Decisions and outputs are compared with recorded ones of cache-dit 1.5.3, step by step (`make peers`).

Where cache-dit has a quirk that should not be copied, the test shows both behaviours.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from benchmarks.late_taylor import LateTaylorSeer
from cachedit_fx.forecasters import TaylorSeerCalibratorConfig
from cachedit_fx.integrations.pipelines import Settings, settings_for
from tests.models import FAMILIES
from tests.peers.cases import CASES, Case, generate, recorded, subject
from tests.reference import ReferenceCache
from tests.sessions import every_session
from tests.several import Several

GUIDANCE_BRANCHES = ("cond", "uncond")
COMPARED = [case for case in CASES if not case.taylorseer_order]


def shares_graphs(family: str) -> pytest.MarkDecorator:
    return pytest.mark.shares_graphs(f"peers-{family}")


def named(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


def config(case: Case) -> cachedit_fx.CacheConfig:
    """The configuration of a case; fields that it leaves out have the defaults of cache-dit's class of that name."""
    kind = cachedit_fx.DBPruneConfig if case.prune else cachedit_fx.DBCacheConfig
    return kind(**case.fields, inner_backend="eager", regions=case.regions)


def structure(case: Case) -> tuple[object, ...]:
    """A key that is equal for cases that can share a compiled graph."""
    return (case.family, case.dtype, config(case).structure, str(case.modifiers))


def run(
    case: Case, transformer: nn.Module
) -> tuple[dict[str, dict[str, list[cachedit_fx.inspect.CacheStats]]], Tensor]:
    """Statistics per branch and region, with one entry for each generation, and the final latents."""
    cachedit_fx.reset(transformer)
    latents = generate(case, subject(case, transformer))
    found: dict[str, dict[str, list[cachedit_fx.inspect.CacheStats]]] = {}
    names: list[str] = []  # In a plain loop the branches have no label; they are in the order in which they are called.
    for stats in every_session(transformer):
        if stats.session not in names:
            names.append(stats.session)
        number = names.index(stats.session) % len(FAMILIES[case.family].guidance_branches)
        found.setdefault(GUIDANCE_BRANCHES[number], {}).setdefault(stats.region, []).append(stats)
    return found, latents


def enabled(case: Case) -> nn.Module:
    """The transformer of the case, with its cache. Cases of one structure share it and its graph.

    Rare structures share one capture per family.
    """
    name = structure(case)
    if name == structure(named(f"{case.family}-plain")) or case.dtype != "float32":
        transformer = of_one_structure(case.family, case.dtype)
        cachedit_fx.enable_cache(transformer, **arguments(case))
        return transformer
    transformer, several = of_several_structures(case.family)
    several.choose(name)
    with mock.patch.object(Settings, "backend", lambda _settings: several):
        cachedit_fx.enable_cache(transformer, **arguments(case))
    return transformer


def arguments(case: Case) -> dict[str, Any]:
    modifiers = [cachedit_fx.ParamsModifier(**fields) for fields in case.modifiers] or None
    return {"cache_config": config(case), "params_modifiers": modifiers}


@functools.cache
def of_one_structure(family: str, dtype: str) -> nn.Module:
    return FAMILIES[family].build().to(getattr(torch, dtype))


@functools.cache
def of_several_structures(family: str) -> tuple[nn.Module, Several]:
    transformer = FAMILIES[family].build()
    plain = structure(named(f"{family}-plain"))
    backends = {}
    for case in COMPARED:
        if case.family == family and case.dtype == "float32" and structure(case) != plain:
            [(_, given)] = settings_for(transformer, **arguments(case)).values()
            backends[structure(case)] = given.backend()
    return transformer, Several(backends)


def over_generations(entries: list[cachedit_fx.inspect.CacheStats]) -> tuple[list[int], dict[int, float]]:
    """Reused steps and diffs, with steps numbered consecutively across generations."""
    starts = [0, *itertools.accumulate(entry.num_steps for entry in entries)]
    steps = [start + s for start, entry in zip(starts, entries, strict=False) for s in entry.cached_steps]
    diffs = {s + start: d for start, e in zip(starts, entries, strict=False) for s, d in e.residual_diffs.items()}
    return steps, diffs


def assert_same(case: Case, found: dict[str, dict[str, list[cachedit_fx.inspect.CacheStats]]], latents: Tensor) -> None:
    wanted = recorded(case)
    assert set(found) == set(wanted["branches"]), case
    for guidance_branch, regions in wanted["branches"].items():
        for name, want in regions.items():
            ours = {
                region: over_generations(e) for region, e in found[guidance_branch].items() if belongs(region, name)
            }
            (assert_same_pruning if case.prune else assert_same_steps)(case, want, ours)
    first = np.array(wanted["latents"]["first"], dtype=np.float32)
    scale = wanted["latents"]["mean_abs"]
    assert list(latents.shape) == wanted["latents"]["shape"]
    # Only the addition of a residual happens in a different order.
    np.testing.assert_allclose(latents.flatten()[: len(first)].numpy(), first, rtol=1e-5, atol=1e-5 * scale)
    assert latents.abs().mean().item() == pytest.approx(scale, rel=1e-5)


def belongs(region: str, recorded_as: str) -> bool:
    return recorded_as in ("merged", region.partition("[")[0])


def assert_same_steps(case: Case, want: dict[str, Any], ours: dict[str, tuple[list[int], dict[int, float]]]) -> None:
    [(steps, diffs)] = ours.values()
    assert steps == want["cached_steps"], case
    recorded_diffs = {int(step): diff for step, diff in want["residual_diffs"].items()}
    # Means in float32 over a few thousand elements, summed in a different order.
    assert diffs == pytest.approx(recorded_diffs, rel=1e-4), case


def assert_same_pruning(case: Case, want: dict[str, Any], ours: dict[str, tuple[list[int], dict[int, float]]]) -> None:
    by_block = {block_number(region, case): entry for region, entry in ours.items()}
    pruned: dict[str, list[int]] = defaultdict(list)
    for block, (steps, diffs) in sorted(by_block.items()):
        for step in steps:
            pruned[str(step)].append(block)
        recorded_diffs = {int(s): d[str(block)] for s, d in want["residual_diffs"].items() if str(block) in d}
        assert diffs == pytest.approx(recorded_diffs, rel=1e-4), (case, block)
    assert pruned == want["pruned_blocks"], case


def block_number(region: str, case: Case) -> int:
    """`single_transformer_blocks[2]` -> 2, or the number in the chain if the lists are merged."""
    path, _, number = region.removesuffix("]").partition("[")
    is_second = case.regions == "merged" and path == "single_transformer_blocks"
    return int(number) + (len(of_one_structure(case.family, case.dtype).transformer_blocks) if is_second else 0)


def by_name(*names: str) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=shares_graphs(named(name).family)) for name in names]
    return pytest.mark.parametrize("name", marked)


def by_structure(cases: list[Case]) -> list[Any]:
    groups: dict[tuple[object, ...], list[Case]] = defaultdict(list)
    for case in cases:
        groups[structure(case)].append(case)
    return [
        pytest.param(
            group, id=str(group[0]) + ("" if len(group) == 1 else "-etc"), marks=shares_graphs(group[0].family)
        )
        for group in groups.values()
    ]


@pytest.mark.parametrize("cases", by_structure([case for case in COMPARED if not case.quirk]))
def test_decisions_and_outputs_equal_those_of_cache_dit(cases):
    for case in cases:
        assert_same(case, *run(case, enabled(case)))


def reference(case: Case) -> list[list[int]]:
    """Reused steps of every generation according to the plain-Python reference, which has none of the quirks."""
    family, found = FAMILIES[case.family], []
    fields = dict(case.fields)
    fields.pop("num_inference_steps", None)
    for seed in range(case.seed, case.seed + case.generations):
        model = family.build()
        guidance_branches = itertools.cycle(family.guidance_branches)
        with ReferenceCache(model, family.chain(model), **fields) as cache:
            model.forward = cache.stand_in_for_forward(
                lambda guidance_branches=guidance_branches: next(guidance_branches)
            )
            family.generate(family.pipeline(model), family.prompt(seed), family.latents(seed), case.num_steps)
        found.append([record.step for record in cache.of("cond") if record.reused])
    return found


def cond_steps(case: Case) -> list[list[int]]:
    """Reused steps of the first branch, per generation, for a graph with one region."""
    found, _ = run(case, enabled(case))
    [entries] = found["cond"].values()
    return [entry.cached_steps for entry in entries]


def recorded_steps(case: Case) -> list[int]:
    [region] = recorded(case)["branches"]["cond"].values()
    return region["cached_steps"]


@by_name("flux-accumulated", "wan-accumulated")
def test_a_computed_step_resets_the_accumulated_limit(name):
    case = named(name)
    assert cond_steps(case) == reference(case)
    assert len(recorded_steps(case)) < len(reference(case)[0])
    assert recorded_steps(case) == reference(case)[0][: len(recorded_steps(case))]  # cache-dit never resets the limit.


@by_name("flux-loop-twice", "wan-loop-twice")
def test_a_second_generation_without_a_pipeline_does_not_depend_on_the_first(name):
    case = named(name)
    ours = cond_steps(case)
    assert ours == reference(case)
    assert recorded_steps(case) != ours[0] + [step + case.num_steps for step in ours[1]]


@by_name("wan-refresh-once", "qwen_image-refresh-once")
def test_a_refresh_counts_the_steps_per_branch(name):
    case = named(name)
    [steps] = cond_steps(case)
    plain = named(f"{case.family}-plain")
    fresh_from = case.fields["force_refresh_step_hint"]
    warm_up = range(fresh_from, fresh_from + 3)
    assert [s for s in steps if s < fresh_from] == [s for s in recorded_steps(plain) if s < fresh_from]
    assert not set(steps) & set(warm_up)
    assert recorded_steps(case) != steps


@shares_graphs("flux")
def test_the_diff_is_computed_in_float32_whatever_the_dtype():
    """cache-dit divides in bfloat16; which decisions that changes depends on the processor."""
    found, _ = run(named("flux-bfloat16"), enabled(named("flux-bfloat16")))
    [[entry]] = found["cond"].values()
    diffs = torch.tensor([*entry.residual_diffs.values()])
    assert len(diffs) and not torch.equal(diffs.bfloat16().float(), diffs)


def pruned(case: Case, guidance_branch: str) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """The pruned blocks by step: those of this package, and the recorded ones."""
    found, _ = run(case, enabled(case))
    ours: dict[int, set[int]] = defaultdict(set)
    for region, [entry] in found[guidance_branch].items():
        for step in entry.cached_steps:
            ours[step].add(block_number(region, case))
    [want] = recorded(case)["branches"][guidance_branch].values()
    return ours, {int(step): set(blocks) for step, blocks in want["pruned_blocks"].items() if blocks}


@shares_graphs("wan")
def test_a_dynamic_threshold_is_the_mean_of_the_diffs_of_its_branch():
    case = named("wan-prune-dynamic")
    ours, theirs = pruned(case, "cond")
    assert ours == theirs
    ours, theirs = pruned(case, "uncond")
    assert ours != theirs


@shares_graphs("wan")
def test_a_limit_of_reused_steps_applies_to_each_block():
    ours, theirs = pruned(named("wan-prune-max-cached"), "cond")
    for block in set.union(*ours.values()):
        assert sum(block in blocks for blocks in ours.values()) <= 3
    assert max(map(len, ours.values())) > len(
        theirs[max(theirs)]
    )  # In cache-dit, pruning stops at the first block of the third step.


@shares_graphs("flux")
def test_the_accumulated_limit_applies_to_pruned_blocks_too():
    case = named("flux-prune-accumulated")
    ours, theirs = pruned(case, "cond")
    assert ours != theirs
    found, _ = run(case, enabled(case))
    for [entry] in found["cond"].values():
        total = 0.0
        for step in range(entry.num_steps):
            if step in entry.cached_steps:
                assert total < case.fields["max_accumulated_residual_diff_threshold"]
                total += entry.residual_diffs[step]
            else:
                total = 0.0


@pytest.mark.parametrize(
    "names", [("flux-taylorseer-1",), ("flux-taylorseer-limits",), ("wan-taylorseer-2", "wan-taylorseer-early")]
)
def test_taylorseer_equals_that_of_cache_dit_apart_from_its_start_and_the_verdict(names: tuple[str, ...]):
    """Only the start and the verdict differ: with those of cache-dit, decisions and outputs are equal."""
    transformer = FAMILIES[named(names[0]).family].build()
    for case in map(named, names):
        order = {"taylorseer_order": case.taylorseer_order}
        cachedit_fx.enable_cache(transformer, config(case), forecaster=LateTaylorSeer(**order))
        assert_same(case, *run(case, transformer))
        if case.quirk:
            cachedit_fx.enable_cache(transformer, config(case), forecaster=TaylorSeerCalibratorConfig(**order))
            with pytest.raises(AssertionError):
                assert_same(case, *run(case, transformer))


def test_every_quirk_has_a_test():
    tested = {
        *("flux-accumulated", "wan-accumulated", "flux-loop-twice", "wan-loop-twice", "wan-refresh-once"),
        *("qwen_image-refresh-once", "flux-bfloat16", "wan-prune-dynamic", "wan-prune-max-cached"),
        "flux-prune-accumulated",
    }
    assert {str(case) for case in COMPARED if case.quirk} == tested
