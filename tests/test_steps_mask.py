"""Predefined masks: the policies of cache-dit, user-defined bins, and the errors for invalid arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachedit_fx import CacheConfig, steps_mask
from cachedit_fx.errors import ConfigError

RECORDED = json.loads((Path(__file__).parent / "peers/recorded/steps_masks.json").read_text(encoding="utf-8"))["masks"]
STEPS = sorted(map(int, RECORDED["slow"]))


def digits(mask):
    return "".join(map(str, mask))


@pytest.mark.parametrize("policy", RECORDED)
def test_policies_equal_those_of_cache_dit(policy):
    found = {str(steps): digits(steps_mask(mask_policy=policy, total_steps=steps)) for steps in STEPS}
    assert found == RECORDED[policy]


def test_the_recorded_masks_cover_all_policies_and_up_to_50_steps():
    assert sorted(RECORDED) == ["fast", "medium", "slow", "ultra"]
    assert [4, 6, *range(8, 51)] == STEPS


@pytest.mark.parametrize("policy", RECORDED)
@pytest.mark.parametrize("steps", [51, 75, 100, 1000])
def test_a_policy_has_a_mask_for_any_number_of_steps(policy, steps):
    mask = steps_mask(mask_policy=policy, total_steps=steps)
    assert len(mask) == steps
    assert set(mask) == {0, 1}
    assert mask[0] == mask[-1] == 1


def test_a_more_aggressive_policy_computes_no_more_steps():
    for steps in STEPS:
        computed = [
            sum(steps_mask(mask_policy=policy, total_steps=steps)) for policy in ("slow", "medium", "fast", "ultra")
        ]
        assert computed == sorted(computed, reverse=True)


def test_the_default_policy_is_medium():
    assert steps_mask(total_steps=28) == steps_mask(mask_policy="medium", total_steps=28)


@pytest.mark.parametrize(
    ("compute", "cache", "total", "expected"),
    [
        pytest.param([3, 1, 1], [2, 2], None, "111001001", id="as-documented"),
        pytest.param([1, 1], [3], None, "10001", id="one-run"),
        pytest.param([3], [], None, "111", id="nothing-is-reused"),
        pytest.param([2, 1], [1, 3], None, "1101001", id="the-last-step-is-computed"),
        pytest.param([2], [1, 3], None, "110001", id="more-runs-of-reuse"),
        pytest.param([1, 2, 3], [1], None, "1011111", id="more-runs-of-compute"),
        pytest.param([3, 1, 1], [2, 2], 9, "111001001", id="the-requested-number"),
        pytest.param([3, 1, 1], [2, 2], 5, "11101", id="cut-short"),
        pytest.param([3, 1, 1], [2, 2], 1, "1", id="one-step"),
        pytest.param((2, 1), (2,), None, "11001", id="tuples"),
    ],
)
def test_bins_are_alternating_runs_of_computed_and_reused_steps(compute, cache, total, expected):
    assert digits(steps_mask(compute_bins=compute, cache_bins=cache, total_steps=total)) == expected


def test_bins_take_precedence_over_a_policy():
    assert digits(steps_mask([1, 1], [1], mask_policy="no such policy")) == "101"


def test_the_arguments_are_not_modified():
    compute, cache = [3, 1, 1], [2, 2]
    steps_mask(compute, cache, total_steps=4)
    for steps in (10, 20, 28, 40):
        assert steps_mask(mask_policy="fast", total_steps=steps) == steps_mask(mask_policy="fast", total_steps=steps)
    assert (compute, cache) == ([3, 1, 1], [2, 2])


def test_a_configuration_accepts_the_mask():
    mask = steps_mask(mask_policy="fast", total_steps=20)
    assert CacheConfig(steps_computation_mask=mask).steps_computation_mask == tuple(mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            dict(compute_bins=[3]), "cache_bins must be given together with compute_bins=[3], got None", id="no-cache"
        ),
        pytest.param(
            dict(cache_bins=[3]), "compute_bins must be given together with cache_bins=[3], got None", id="no-compute"
        ),
        pytest.param(
            dict(compute_bins=[3, 1], cache_bins=[2], total_steps=7),
            "compute_bins and cache_bins must cover total_steps=7, they add up to 6",
            id="too-short",
        ),
        pytest.param(
            dict(compute_bins=[], cache_bins=[]),
            "compute_bins and cache_bins must add up to at least one step, got [], []",
            id="empty",
        ),
        pytest.param(
            dict(compute_bins=[1], cache_bins=[1], total_steps=0), "total_steps must be an int >= 1, got 0", id="none"
        ),
        pytest.param(dict(), "total_steps must be given with mask_policy='medium', got None", id="no-steps"),
        pytest.param(dict(total_steps=0), "total_steps must be an int >= 1, got 0", id="no-step"),
        pytest.param(dict(total_steps=-1), "total_steps must be an int >= 1, got -1", id="below-0"),
        *(
            pytest.param(
                dict(total_steps=steps), f"total_steps must be 4, 6, or at least 8 for a mask_policy, got {steps}"
            )
            for steps in (1, 2, 3, 5, 7)
        ),
        pytest.param(
            dict(mask_policy="fats", total_steps=28),
            "mask_policy must be one of slow, medium, fast, ultra, got 'fats'. Did you mean 'fast'?",
            id="misspelt",
        ),
        pytest.param(
            dict(mask_policy=None, total_steps=28),
            "mask_policy must be one of slow, medium, fast, ultra, got None.",
            id="no-policy",
        ),
    ],
)
def test_an_invalid_argument_is_named_in_the_error(arguments, message):
    with pytest.raises(ConfigError) as caught:
        steps_mask(**arguments)
    assert str(caught.value).startswith(f"cachedit_fx: {message}")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        pytest.param(dict(compute_bins=[3, -1, 2], cache_bins=[1, 1]), "compute_bins", id="a-run-below-0"),
        pytest.param(dict(compute_bins=[1.5], cache_bins=[1]), "compute_bins", id="half-a-step"),
        pytest.param(dict(compute_bins=3, cache_bins=[1]), "compute_bins", id="a-number"),
        pytest.param(dict(compute_bins=[1], cache_bins=["2"]), "cache_bins", id="a-string"),
        pytest.param(dict(compute_bins=[2, 1], cache_bins=[1], total_steps=-1), "total_steps", id="steps-below-0"),
        pytest.param(dict(total_steps=28.0), "total_steps", id="steps-not-whole"),
        pytest.param(dict(total_steps="28"), "total_steps", id="steps-in-a-string"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named_in_the_error(arguments, name):
    with pytest.raises(ConfigError, match=name):
        steps_mask(**arguments)
