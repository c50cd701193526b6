"""DBPrune: every block has its own decision, based on how far its input moved since it was last computed.

The reference replaces the blocks' forwards: it compares a block's input with the one at its last computed step, and
adds the residual of every stream. Outputs are compared bitwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig, DBPruneConfig, ForwardPattern, NoMatchError, ParamsModifier
from tests import hybrid, tiny
from tests.hybrid import DUAL, SINGLE, calls
from tests.regions import Decide, Span, assert_diffs, at_steps, runs, threshold
from tests.sessions import every_session
from tests.tiny import Watch, assert_bitwise

STREAMS = ("hidden_states", "encoder_hidden_states")  # The outputs of a block of `tests.tiny`.
LIMIT = 0.05  # The inputs of the later blocks of `drifting` exceed it later.


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def drifting() -> list[dict[str, Tensor]]:
    """The calls of a generation whose latents move evenly while the timestep hardly changes."""
    times = tuple(1 - 0.001 * step for step in range(8))
    drift = tiny.latents(51)
    return [
        call | {"hidden_states": call["hidden_states"] + 0.02 * step * drift} for step, call in enumerate(calls(times))
    ]


def pruned(model: nn.Module, **fields: Any) -> tuple[list[Tensor], dict[str, cachedit_fx.inspect.CacheStats]]:
    """The outputs of a generation, and the statistics of its regions by name."""
    base = dict(Fn_compute_blocks=0, residual_diff_threshold=LIMIT, max_warmup_steps=1, inner_backend="eager")
    cachedit_fx.enable_cache(model, DBPruneConfig(**base | fields))
    outputs = [model(**call)[0] for call in drifting()]
    return outputs, {stats.region: stats for stats in every_session(model)}


def reference(numbers: Sequence[int], decide: Decide | None = None) -> tuple[list[Tensor], dict[str, Span]]:
    """The same by the reference, with the given blocks of `tests.tiny` pruned, each by a separate decision."""
    model = tiny.build()
    decide = decide or threshold(LIMIT)
    spans = {f"blocks[{i}]": Span([model.blocks[i]], STREAMS, decide) for i in numbers}
    return runs(model, [*spans.values()], drifting()), spans


def assert_same(found: dict[str, cachedit_fx.inspect.CacheStats], spans: dict[str, Span]) -> None:
    assert list(found) == list(spans)
    for name, span in spans.items():
        assert found[name].cached_steps == span.cached_steps, name
        assert_diffs(found[name], span)


def test_every_block_has_its_own_decision():
    outputs, found = pruned(tiny.build())
    expected, spans = reference(range(4))
    assert_same(found, spans)
    assert_bitwise(outputs, expected)
    steps = [span.cached_steps for span in spans.values()]
    assert len(set(map(tuple, steps))) > 1  # Otherwise one decision for all blocks would not be noticed,
    assert all(0 < len(cached) < 7 for cached in steps)  # and neither would a constant one.


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        pytest.param({"Fn_compute_blocks": 1}, [1, 2, 3], id="F1"),
        pytest.param({"Bn_compute_blocks": 2}, [0, 1], id="B2"),
        pytest.param({"Fn_compute_blocks": 1, "Bn_compute_blocks": 1}, [1, 2], id="F1B1"),
        pytest.param({"non_prune_block_ids": [1, 3]}, [0, 2], id="excluded"),
        pytest.param(
            {"Fn_compute_blocks": 1, "non_prune_block_ids": [0, 2, 9]}, [1, 3], id="excluded-twice-and-out-of-range"
        ),
    ],
)
def test_blocks_that_are_never_pruned_have_no_region(fields, numbers):
    outputs, found = pruned(tiny.build(), **fields)
    expected, spans = reference(numbers)
    assert_same(found, spans)
    assert_bitwise(outputs, expected)


def test_a_pruned_block_does_not_run():
    model = tiny.build()
    base = hybrid.config(Fn_compute_blocks=0, residual_diff_threshold=LIMIT)
    cachedit_fx.enable_cache(model, base.override(DBPruneConfig()))
    ran = []
    for call in drifting():
        Watch.ran = 0
        model(**call)
        ran.append(Watch.ran)
    skipped = [stats.cached_steps for stats in every_session(model)]
    assert ran == [4 - sum(step in steps for steps in skipped) for step in range(8)]


def test_computed_steps_match_the_model_bitwise():
    outputs, found = pruned(tiny.build(), residual_diff_threshold=0.0)
    assert not any(stats.cached_steps for stats in found.values())
    plain = tiny.build()
    assert_bitwise(outputs, [plain(**call)[0] for call in drifting()])


@pytest.mark.parametrize(
    ("fields", "computed"),
    [
        pytest.param({}, [0], id="without"),
        pytest.param({"max_warmup_steps": 3}, [0, 1, 2], id="warmup"),
        pytest.param({"max_cached_steps": 2}, [0, 3, 4, 5, 6, 7], id="max-cached"),
        pytest.param({"max_continuous_cached_steps": 1}, [0, 2, 4, 6], id="max-continuous"),
        pytest.param({"force_refresh_step_hint": 4}, [0, 4], id="refresh"),
        pytest.param(
            {"steps_computation_mask": [1, 0, 0, 1, 0], "steps_computation_policy": "static"}, [0, 3], id="static-mask"
        ),
    ],
)
def test_every_block_has_its_own_limits(fields, computed):
    outputs, found = pruned(tiny.build(), residual_diff_threshold=1.0, **fields)
    expected, spans = reference(range(4), at_steps(computed))
    assert [stats.cached_steps for stats in found.values()] == [span.cached_steps for span in spans.values()]
    assert_bitwise(outputs, expected)


def dynamic_threshold(spans: list[Span], *, ratio: float, cap: float) -> Decide:
    """The relaxed mean of the first five diffs of this step, limited to the range from the threshold to the cap."""

    def decide(step: int, diff: float | None) -> bool:
        if diff is None:
            return True
        before = itertools.takewhile(lambda span: len(span.reused) > step, spans)
        known = [span.diffs[step] for span in before][:5]
        known = [earlier for earlier in known if earlier is not None and earlier > 0]
        relaxed = ratio * sum(known) / len(known) if known else 0.0
        return not diff < (max(LIMIT, relaxed) if relaxed < cap else LIMIT)

    return decide


@pytest.mark.parametrize(
    ("fields", "ratio", "cap"),
    [
        pytest.param({}, 1.25, 2 * LIMIT, id="by-default"),
        pytest.param({"max_dynamic_prune_threshold": 0.5}, 1.25, 0.5, id="up-to-more"),
        pytest.param({"dynamic_prune_threshold_relax_ratio": 1.1}, 1.1, 2 * LIMIT, id="relaxed-less"),
    ],
)
def test_a_dynamic_threshold_follows_the_diffs_of_the_earlier_blocks(fields, ratio, cap):
    model = tiny.build(num_blocks=8)
    outputs, found = pruned(model, enable_dynamic_prune_threshold=True, **fields)
    model = tiny.build(num_blocks=8)
    spans: list[Span] = []
    decide = dynamic_threshold(spans, ratio=ratio, cap=cap)
    spans += [Span([block], STREAMS, decide) for block in model.blocks]
    expected = runs(model, spans, drifting())
    assert_same(found, {f"blocks[{i}]": span for i, span in enumerate(spans)})
    assert_bitwise(outputs, expected)
    fixed = [Span([block], STREAMS, threshold(LIMIT)) for block in model.blocks]
    runs(model, fixed, drifting())
    assert [span.cached_steps for span in spans] != [
        span.cached_steps for span in fixed
    ]  # The dynamic threshold has an effect.


def test_blocks_of_a_second_list_are_pruned_too():
    """Text and image are joined after the last block of the first list, which has the residual of the joined stream."""
    outputs, found = pruned(hybrid.build())
    model = hybrid.build()
    spans = {f"blocks[{i}]": Span([model.blocks[i]], DUAL, threshold(LIMIT)) for i in range(3)}
    spans |= {f"single_blocks[{i}]": Span([b], SINGLE, threshold(LIMIT)) for i, b in enumerate(model.single_blocks)}
    expected = runs(model, [*spans.values()], drifting())
    assert_same(found, spans)
    assert_bitwise(outputs, expected)


def test_one_list_can_be_pruned_while_another_is_cached_as_a_whole():
    model = hybrid.build()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.blocks, model.single_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_3],
        params_modifiers=[None, ParamsModifier(DBPruneConfig(Fn_compute_blocks=0, non_prune_block_ids=[1]))],
    )
    cachedit_fx.enable_cache(adapter, hybrid.config(residual_diff_threshold=LIMIT))
    outputs = [model(**call)[0] for call in drifting()]
    found = {stats.region: stats for stats in every_session(model)}
    plain = hybrid.build()
    spans = {
        "blocks[1:3]": Span(plain.blocks[1:], DUAL, threshold(LIMIT), since=plain.blocks[0]),
        "single_blocks[0]": Span([plain.single_blocks[0]], SINGLE, threshold(LIMIT)),
        "single_blocks[2]": Span([plain.single_blocks[2]], SINGLE, threshold(LIMIT)),
    }
    expected = runs(plain, [*spans.values()], drifting())
    assert_same(found, spans)
    assert_bitwise(outputs, expected)


def test_a_configuration_without_a_prunable_block_is_refused_with_a_reason():
    model = tiny.build()
    fields = dict(Fn_compute_blocks=1, non_prune_block_ids=[1, 2, 3], on_no_match="raise", inner_backend="eager")
    cachedit_fx.enable_cache(model, DBPruneConfig(**fields))
    with pytest.raises(
        NoMatchError, match="expected: a block of blocks that may be pruned\n  found:    every block is in non_prune"
    ):
        model(**drifting()[0])


def test_the_cache_type_can_be_given_as_a_field():
    _, found = pruned(tiny.build())
    model = cachedit_fx.enable_cache(
        tiny.build(), CacheConfig(0, 0, LIMIT, 1, forecaster=None, inner_backend="eager"), cache_type="DBPrune"
    )
    for call in drifting():
        model(**call)
    assert [stats.residual_diffs for stats in every_session(model)] == [s.residual_diffs for s in found.values()]
