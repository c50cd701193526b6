"""Helpers of the tests of whole generations: transformers compiled once per family, and runs of the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import cachedit_fx
from tests.models import FAMILIES, WAN, Family, denoise, denoise_steps
from tests.reference import Record, ReferenceCache
from tests.sessions import every_session
from tests.several import Several

NUM_STEPS = 14
WARMUP_STEPS = 3

LIMITS = {
    "max-cached": {"max_cached_steps": 3},
    "max-continuous": {"max_continuous_cached_steps": 1},
    "accumulated-diff": {"max_accumulated_residual_diff_threshold": 0.1},
    "diff-below": {"warmup_interval": 2},
    "threshold-one": {"residual_diff_threshold": 1.0},
}
"""Limits by the reason of the decisions that each of them causes."""

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def on_shared_graphs(*families: Family) -> pytest.MarkDecorator:
    """Parametrizes `family`; `compiled(family)` is traced only for the first of all the tests that are marked so."""
    marked = [pytest.param(f, id=f.name, marks=pytest.mark.shares_graphs(f"pipelines-{f.name}")) for f in families]
    return pytest.mark.parametrize("family", marked)


on_every_family = on_shared_graphs(*FAMILIES.values())


def settings(family: Family, Fn: int = 1, Bn: int = 0, **others: Any) -> dict[str, Any]:
    return dict(
        Fn_compute_blocks=Fn,
        Bn_compute_blocks=Bn,
        residual_diff_threshold=family.threshold,
        max_warmup_steps=WARMUP_STEPS,
        forecaster=None,
        **others,
    )


def limited(limit: dict[str, Any]) -> dict[str, Any]:
    """Settings with a threshold so high that the diff alone rarely causes a computed step, and `limit` in addition."""
    return settings(WAN, max_continuous_cached_steps=4) | {"residual_diff_threshold": 0.2} | limit


def backend(inner: str = "eager", **fields: Any) -> cachedit_fx.Backend:
    return cachedit_fx.Backend(cachedit_fx.CacheConfig(**fields, inner_backend=inner))


@dataclass(frozen=True)
class Traced:
    """A transformer, compiled in place by one trace for all configurations of this file.

    Attributes:
        num_graphs: Number of graphs that Dynamo captured at the first step.
        graph_breaks: Dynamo's reasons for graph breaks.
    """

    model: nn.Module
    several: Several
    num_graphs: int
    graph_breaks: dict[str, int]


@functools.cache
def trace(family: Family) -> Traced:
    used = [settings(family), settings(family, 2, 1)]
    used += [limited(limit) for limit in LIMITS.values()] if family is WAN else []
    several = Several({frozenset(fields.items()): backend(**fields) for fields in used})
    model = family.build()
    model.compile(backend=several, fullgraph=True)
    counters.clear()
    next(denoise_steps(Recorder(model), family, family.prompt(3), family.latents(3), NUM_STEPS))
    found = Traced(model, several, counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    cachedit_fx.reset()
    return found


@functools.cache
def compiled_for_pipelines(family: Family) -> nn.Module:
    """The family's transformer, compiled in place for pipelines, which pass other arguments than the plain loop."""
    model = family.build()
    model.compile(backend=backend(**settings(family)), fullgraph=True)
    family.generate(family.pipeline(model), family.prompt(3), family.latents(3), 2)
    cachedit_fx.reset()
    return model


def compiled(family: Family, fields: dict[str, Any]) -> nn.Module:
    """The family's transformer for the plain loop, configured with these fields."""
    traced = trace(family)
    traced.several.choose(frozenset(fields.items()))
    return traced.model


class Recorder:
    """Calls a compiled transformer in place of the reference and records its outputs.

    It records the tensors themselves and not copies, so that a later call that writes into one would be detected.
    """

    def __init__(self, module: Callable[..., tuple[Tensor, ...]]) -> None:
        self.module = module
        self.outputs: list[Tensor] = []

    def __call__(self, guidance_branch: str, **inputs: Any) -> Tensor:
        output = self.module(**inputs)[0]
        self.outputs.append(output)
        return output


@functools.cache
def reference_run(family: Family, seed: int, **fields: Any) -> ReferenceCache:
    """One generation by the reference, in the plain loop."""
    model = family.build()
    with ReferenceCache(model, family.chain(model), **fields) as reference:
        denoise(reference, family, family.prompt(seed), family.latents(seed), NUM_STEPS)
    for guidance_branch in family.guidance_branches:
        assert_worth_comparing(reference.of(guidance_branch))
    return reference


@functools.cache
def reference_pipeline_run(family: Family, seed: int, **fields: Any) -> tuple[ReferenceCache, list[Tensor]]:
    """One generation by the reference, in the real pipeline, and the latents after every step."""
    model = family.build()
    guidance_branches = itertools.cycle(family.guidance_branches)
    with ReferenceCache(model, family.chain(model), **fields) as reference:
        model.forward = reference.stand_in_for_forward(lambda: next(guidance_branches))
        latents = family.generate(family.pipeline(model), family.prompt(seed), family.latents(seed), NUM_STEPS)
    for guidance_branch in family.guidance_branches:
        assert_worth_comparing(reference.of(guidance_branch))
    return reference, latents


def assert_worth_comparing(records: list[Record]) -> None:
    """Computed and reused steps both occur after the warm-up, so that a constant decision would be detected."""
    after_warmup = [record.reused for record in records if record.reason != "warmup"]
    assert any(after_warmup), "nothing was reused"
    assert not all(after_warmup), "nothing was computed after warm-up"


def assert_same_decisions(stats: cachedit_fx.inspect.CacheStats, records: list[Record]) -> None:
    """Every step of a session has the decision and the diff of the reference."""
    assert stats.decisions == [record.reason for record in records]
    assert stats.num_steps == len(records)
    assert list(stats.cached_steps) == [record.step for record in records if record.reused]
    diffs = {record.step: record.diff for record in records if record.diff is not None}
    # The means over a few thousand float32 elements are summed in another order by a compiled kernel.
    assert dict(stats.residual_diffs) == pytest.approx(diffs, rel=1e-4)


def assert_newest_sessions(module: nn.Module, family: Family, reference: ReferenceCache) -> None:
    """The last sessions of `module`, one per guidance branch, have the decisions of the reference."""
    newest = every_session(module)[-len(family.guidance_branches) :]
    for guidance_branch, stats in zip(family.guidance_branches, newest, strict=True):
        assert_same_decisions(stats, reference.of(guidance_branch))


def assert_bitwise(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(output, wanted, rtol=0, atol=0, msg=lambda text, i=index: f"output {i}: {text}")


def outputs_of(reference: ReferenceCache) -> list[Tensor]:
    return [record.output for record in reference.records]
