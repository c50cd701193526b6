"""`decide` is compared with tables, and with a reference that evaluates the full record of a session."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.policies import Decision, History, decide, needs_refresh

REUSED = ("threshold-one", "diff-below", "mask-static")


def run(config, diffs, *, first_still=0):
    """The reasons of a session's decisions; every step has a cached value except the first and those of a refresh."""
    history, reasons = History(), []
    for number, diff in enumerate(diffs):
        if needs_refresh(config, history):
            history = history.refreshed()
        moved = history._replace(has_moved=number > first_still)
        decision = decide(config, moved, diff, is_cached=history.num_steps > 0)
        assert decision.compute == (decision.reason not in REUSED)
        reasons.append(decision.reason)
        history = history.after(decision)
    return reasons


def pattern(reasons):
    """`.` for a computed step, `C` for a reused one."""
    return "".join("C" if reason in REUSED else "." for reason in reasons)


# Every check applies in this situation, so the reason is that of the first check that is not removed.
ALL = dict(
    config=dict(
        max_warmup_steps=8,
        max_cached_steps=2,
        max_continuous_cached_steps=1,
        max_accumulated_residual_diff_threshold=0.1,
        residual_diff_threshold=0.0,
    ),
    history=dict(num_steps=4, num_cached=2, num_continuous=1, accumulated_diff=0.1, has_moved=False),
    is_cached=False,
    diff=math.nan,
)


def without(*, config=(), history=(), **others):
    return ALL | {"config": ALL["config"] | dict(config), "history": ALL["history"] | dict(history)} | others


PAST_WARMUP = dict(max_warmup_steps=4)
PAST_TOTAL = PAST_WARMUP | dict(max_cached_steps=3)
PAST_RUN = PAST_TOTAL | dict(max_continuous_cached_steps=2)
PAST_CAP = PAST_RUN | dict(max_accumulated_residual_diff_threshold=0.11)
PAST_ZERO = PAST_CAP | dict(residual_diff_threshold=0.2)
PAST_ZERO_ONE = PAST_CAP | dict(residual_diff_threshold=1.0)
MOVED = dict(has_moved=True)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        pytest.param(without(), Decision(True, "warmup"), id="1-warmup"),
        pytest.param(without(config=PAST_WARMUP), Decision(True, "max-cached"), id="2-max-cached"),
        pytest.param(without(config=PAST_TOTAL), Decision(True, "max-continuous"), id="3-max-continuous"),
        pytest.param(without(config=PAST_RUN), Decision(True, "accumulated-diff"), id="4-accumulated"),
        pytest.param(without(config=PAST_CAP), Decision(True, "threshold-zero"), id="5-threshold-zero"),
        pytest.param(without(config=PAST_ZERO), Decision(True, "nothing-stored"), id="6-nothing-stored"),
        pytest.param(without(config=PAST_ZERO, is_cached=True), Decision(True, "timestep-still"), id="7-still"),
        pytest.param(
            without(config=PAST_ZERO_ONE, is_cached=True, history=MOVED),
            Decision(False, "threshold-one"),
            id="8-threshold-one",
        ),
        pytest.param(
            without(config=PAST_ZERO, is_cached=True, history=MOVED),
            Decision(True, "nan", probed=True),
            id="9-nan",
        ),
        pytest.param(
            without(config=PAST_ZERO, is_cached=True, history=MOVED, diff=0.19),
            Decision(False, "diff-below", probed=True),
            id="9-below",
        ),
        pytest.param(
            without(config=PAST_ZERO, is_cached=True, history=MOVED, diff=0.2),
            Decision(True, "diff-above", probed=True),
            id="9-equal-is-above",
        ),
        pytest.param(
            without(config=PAST_ZERO, is_cached=True, history=MOVED, diff=math.inf),
            Decision(True, "diff-above", probed=True),
            id="9-infinite",
        ),
    ],
)
def test_the_first_check_that_applies_decides(situation, expected):
    config = CacheConfig(**situation["config"])
    found = decide(config, History(**situation["history"]), situation["diff"], is_cached=situation["is_cached"])
    assert found == expected


@pytest.mark.parametrize(
    ("fields", "diffs", "expected"),
    [
        pytest.param({}, [0.0] * 5, "...CC", id="plain"),
        pytest.param({"max_warmup_steps": 0}, [0.0] * 4, ".CCC", id="no-warmup-still-computes-first"),
        pytest.param({"max_warmup_steps": 6, "warmup_interval": 2}, [0.0] * 8, ".C.C.CCC", id="warmup-interval"),
        pytest.param({"max_warmup_steps": 7, "warmup_interval": 3}, [0.0] * 8, ".CC.CC.C", id="warmup-interval-3"),
        pytest.param({"max_warmup_steps": 2, "warmup_interval": 9}, [0.0] * 4, ".CCC", id="interval-beyond-warmup"),
        pytest.param({"max_cached_steps": 0}, [0.0] * 6, "......", id="max-cached-0"),
        pytest.param({"max_cached_steps": 2}, [0.0] * 7, "...CC..", id="max-cached-2"),
        pytest.param({"max_continuous_cached_steps": 0}, [0.0] * 6, "......", id="max-continuous-0"),
        pytest.param({"max_continuous_cached_steps": 1}, [0.0] * 9, "...C.C.C.", id="max-continuous-1"),
        pytest.param({"max_continuous_cached_steps": 2}, [0.0] * 9, "...CC.CC.", id="max-continuous-2"),
        pytest.param(
            {"max_continuous_cached_steps": 2},
            [0, 0, 0, 0, 0.5, 0, 0, 0, 0],
            "...C.CC.C",
            id="a-run-ends-at-a-step-computed-for-another-reason",
        ),
        pytest.param(
            {"max_accumulated_residual_diff_threshold": 0.0}, [0.0625] * 6, "...CCC", id="accumulated-0-is-no-limit"
        ),
        pytest.param(
            {"max_accumulated_residual_diff_threshold": 0.125},
            [0, 0, 0, 0.0625, 0.0625, 0, 0.0625, 0.0625, 0],
            "...CC.CC.",
            id="accumulated-resets-at-a-computed-step",
        ),
        pytest.param({"residual_diff_threshold": 0.0}, [0.0] * 6, "......", id="threshold-0"),
        pytest.param({"residual_diff_threshold": -1.0}, [-2.0] * 6, "......", id="threshold-below-0"),
        pytest.param({"residual_diff_threshold": 1.0}, [9.0, math.nan] * 3, "...CCC", id="threshold-1-never-probes"),
        pytest.param({}, [0, 0, 0, 0, math.nan, 0, math.nan], "...C.C.", id="nan-computes"),
    ],
)
def test_a_session_makes_the_expected_decisions(fields, diffs, expected):
    config = CacheConfig(**dict(max_warmup_steps=3, residual_diff_threshold=0.1) | fields)
    assert pattern(run(config, diffs)) == expected


def test_a_step_that_was_not_probed_adds_nothing_to_the_accumulated_diff():
    config = CacheConfig(max_warmup_steps=1, residual_diff_threshold=1.0, max_accumulated_residual_diff_threshold=0.1)
    assert pattern(run(config, [0.0, 5.0, 5.0, math.nan, 5.0])) == ".CCCC"


def test_nothing_is_reused_before_the_timestep_has_moved():
    config = CacheConfig(max_warmup_steps=1, residual_diff_threshold=0.1)
    reasons = run(config, [0.0] * 5, first_still=2)
    assert reasons == ["warmup", "timestep-still", "timestep-still", "diff-below", "diff-below"]


# Masks.


NEVER = 9.0  # No threshold lets a step with this diff be reused.


@pytest.mark.parametrize(
    ("mask", "fields", "diffs", "expected"),
    [
        pytest.param("100100", {}, [0.0] * 8, ".CC.CCCC", id="beyond-its-end-a-mask-is-0"),
        pytest.param("100100", {}, [0, 0.5, 0, 0, 0.5, 0, 0, 0.5], "..C..CC.", id="dynamic-probes-where-the-mask-is-0"),
        pytest.param("100100", {"max_cached_steps": 3}, [0.0] * 8, ".CC.C...", id="dynamic-respects-limits"),
        pytest.param("100100", {"residual_diff_threshold": 0.0}, [0.0] * 4, "....", id="dynamic-at-threshold-0"),
        pytest.param("10", {"residual_diff_threshold": 1.0}, [NEVER] * 4, ".CCC", id="dynamic-at-threshold-1"),
        pytest.param("111110", {}, [0.0] * 7, ".....CC", id="ones-after-the-warmup-are-computed"),
        pytest.param("1", {}, [0.0] * 4, ".CCC", id="a-short-mask-caps-the-warmup"),
        pytest.param("0111", {}, [0.0] * 6, "....CC", id="a-mask-that-begins-with-0-has-no-warmup"),
        pytest.param("1110", {"warmup_interval": 2}, [0.0] * 6, "...CCC", id="ones-between-the-warmup-intervals"),
        pytest.param("100100", {"max_warmup_steps": 0}, [0.0] * 6, ".CC.CC", id="no-warmup"),
        pytest.param("100100", {"static": True}, [NEVER] * 8, ".CC.CCCC", id="static-never-probes"),
        pytest.param("100100", {"static": True}, [math.nan] * 8, ".CC.CCCC", id="static-takes-any-diff"),
        pytest.param("0011", {"static": True}, [0.0] * 6, ".C..CC", id="static-with-nothing-stored-computes"),
        pytest.param(
            "1000",
            dict(
                static=True,
                max_cached_steps=0,
                max_continuous_cached_steps=0,
                max_accumulated_residual_diff_threshold=0.01,
                residual_diff_threshold=0.0,
            ),
            [NEVER] * 6,
            ".CCCCC",
            id="static-ignores-limits",
        ),
    ],
)
def test_a_session_with_a_mask_makes_the_expected_decisions(mask, fields, diffs, expected):
    fields = dict(max_warmup_steps=3, residual_diff_threshold=0.1) | fields
    policy = "static" if fields.pop("static", False) else "dynamic"
    config = CacheConfig(**fields, steps_computation_mask=[*map(int, mask)], steps_computation_policy=policy)
    assert pattern(run(config, diffs)) == expected


def test_a_mask_gives_reasons_for_computed_and_reused_steps():
    mask = dict(max_warmup_steps=2, residual_diff_threshold=0.1, steps_computation_mask=[1, 1, 1, 0, 1])
    assert run(CacheConfig(**mask), [0.0] * 6) == ["warmup", "warmup", "mask", "diff-below", "mask", "diff-below"]
    static = CacheConfig(**mask, steps_computation_policy="static")
    assert run(static, [0.0] * 6) == ["warmup", "warmup", "mask", "mask-static", "mask", "mask-static"]


def test_a_static_policy_without_a_mask_probes():
    config = CacheConfig(max_warmup_steps=1, residual_diff_threshold=0.1, steps_computation_policy="static")
    assert run(config, [0.0, 0.0, 0.5]) == ["warmup", "diff-below", "diff-above"]


def test_a_static_mask_reuses_nothing_before_the_timestep_has_moved():
    config = CacheConfig(steps_computation_mask=[1, 0, 0], steps_computation_policy="static")
    assert run(config, [0.0] * 4, first_still=1) == ["warmup", "timestep-still", "mask-static", "mask-static"]


def test_a_step_that_a_static_mask_reuses_was_not_probed():
    config = CacheConfig(steps_computation_mask=[1, 0], steps_computation_policy="static")
    decision = decide(config, History(num_steps=1, has_moved=True), 0.01, is_cached=True)
    assert decision == Decision(False, "mask-static", probed=False)


# Refreshing.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(dict(force_refresh_step_hint=None), "..CCCCCCCCCC", id="never"),
        pytest.param(dict(force_refresh_step_hint=5), "..CCC..CCCCC", id="once-by-default"),
        pytest.param(dict(force_refresh_step_hint=5, force_refresh_step_policy="once"), "..CCC..CCCCC", id="once"),
        pytest.param(dict(force_refresh_step_hint=5, force_refresh_step_policy="repeat"), "..CCC..CCC..", id="repeat"),
        pytest.param(dict(force_refresh_step_hint=1, force_refresh_step_policy="repeat"), "." * 12, id="every-step"),
        pytest.param(dict(force_refresh_step_hint=1), "...CCCCCCCCC", id="once-after-the-first"),
        pytest.param(dict(force_refresh_step_hint=99), "..CCCCCCCCCC", id="beyond-the-end"),
        pytest.param(dict(force_refresh_step_hint=5, max_cached_steps=2), "..CC...CC...", id="limits-start-over"),
        pytest.param(
            dict(force_refresh_step_hint=5, steps_computation_mask=[1, 0, 1, 0]), ".C.CC.C.CCCC", id="masks-start-over"
        ),
    ],
)
def test_before_the_hinted_step_the_policy_starts_over(fields, expected):
    config = CacheConfig(max_warmup_steps=2, residual_diff_threshold=0.1, **fields)
    assert pattern(run(config, [0.0] * 12)) == expected


@pytest.mark.parametrize(("policy", "expected"), [("once", [4]), ("repeat", [4, 8, 12])])
def test_a_refresh_is_due_at_the_hinted_step_and_counts(policy, expected):
    config = CacheConfig(force_refresh_step_hint=4, force_refresh_step_policy=policy)
    history, due = History(), []
    for step in range(14):
        if needs_refresh(config, history):
            due.append(step)
            history = history.refreshed()
        history = history.after(Decision(True, "warmup"))
    assert due == expected
    assert history.num_refreshes == len(expected)


# The threshold of pruning.


@pytest.mark.parametrize(
    ("earlier", "fields", "threshold"),
    [
        pytest.param([], {}, 0.1, id="no-diff-yet"),
        pytest.param([0.12], {}, 0.15, id="the-mean-relaxed"),
        pytest.param([0.02], {}, 0.1, id="never-below-the-threshold-itself"),
        pytest.param([0.08, 0.16], {}, 0.15, id="mean-of-two"),
        pytest.param([0.12] * 5 + [5.0], {}, 0.15, id="of-the-first-five"),
        pytest.param([0.0, 0.12, math.nan], {}, 0.15, id="only-those-above-0"),
        pytest.param([0.16], {}, 0.1, id="at-twice-the-threshold-it-is-not-relaxed"),
        pytest.param([math.inf], {}, 0.1, id="infinite"),
        pytest.param([0.2], {"max_dynamic_prune_threshold": 0.3}, 0.25, id="up-to-a-maximum"),
        pytest.param([0.12], {"max_dynamic_prune_threshold": 0.15}, 0.1, id="strictly-below-the-maximum"),
        pytest.param([0.08], {"dynamic_prune_threshold_relax_ratio": 2.0}, 0.16, id="by-another-factor"),
        pytest.param([0.12], {"enable_dynamic_prune_threshold": False}, 0.1, id="switched-off"),
    ],
)
def test_a_dynamic_threshold_follows_the_diffs_before_it(earlier, fields, threshold):
    base = dict(residual_diff_threshold=0.1, enable_dynamic_prune_threshold=True)
    config = CacheConfig(**base | fields)
    history = History(num_steps=9, has_moved=True)
    for diff, reason in ((threshold * 0.999, "diff-below"), (threshold * 1.001, "diff-above")):
        decision = decide(config, history, diff, is_cached=True, earlier=earlier)
        assert decision == Decision(reason == "diff-above", reason, probed=True)


# The reference.


def reference_decision(fields, record, diff, is_cached, has_moved):
    """Evaluates `record`, one (reason, diff) per step, from scratch, in the order that the documentation gives."""
    threshold = fields["residual_diff_threshold"]
    mask = fields["steps_computation_mask"]
    bit = None if mask is None else (mask[len(record)] if len(record) < len(mask) else 0)
    warmup = fields["max_warmup_steps"] if mask is None else min(fields["max_warmup_steps"], ([*mask, 0]).index(0))
    run = []
    for reason, old in reversed(record):
        if reason not in REUSED:
            break
        run.insert(0, old if reason == "diff-below" else 0.0)
    reused = [reason for reason, _ in record if reason in REUSED]
    if len(record) in range(0, warmup, fields["warmup_interval"]):
        return "warmup"
    if bit == 1:
        return "mask"
    if bit == 0 and fields["steps_computation_policy"] == "static":
        return "nothing-stored" if not is_cached else "mask-static" if has_moved else "timestep-still"
    if 0 <= fields["max_cached_steps"] <= len(reused):
        return "max-cached"
    if 0 <= fields["max_continuous_cached_steps"] <= len(run):
        return "max-continuous"
    cap = fields["max_accumulated_residual_diff_threshold"]
    if cap and sum(run) >= cap:
        return "accumulated-diff"
    if threshold <= 0:
        return "threshold-zero"
    if not is_cached:
        return "nothing-stored"
    if not has_moved:
        return "timestep-still"
    if threshold >= 1:
        return "threshold-one"
    if math.isnan(diff):
        return "nan"
    return "diff-below" if diff < threshold else "diff-above"


limits = st.integers(-1, 4)
configs = st.fixed_dictionaries(
    dict(
        residual_diff_threshold=st.sampled_from([-1.0, 0.0, 0.05, 0.2, 0.2, 0.5, 1.0, 3.0]),
        max_warmup_steps=st.integers(0, 5),
        warmup_interval=st.integers(1, 4),
        max_cached_steps=limits,
        max_continuous_cached_steps=limits,
        max_accumulated_residual_diff_threshold=st.none() | st.floats(0, 0.6),
        steps_computation_mask=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=12),
        steps_computation_policy=st.sampled_from(["dynamic", "static"]),
    )
)
steps = st.lists(
    st.tuples(
        st.floats(0, 0.4) | st.sampled_from([0.05, 0.2, math.inf, math.nan]),
        st.sampled_from([True, True, True, False]),  # Whether a value of the right shape is cached,
        st.sampled_from([True, True, True, False]),  # and whether the timestep has moved.
    ),
    max_size=24,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs, steps)
@example(
    dict(
        residual_diff_threshold=0.2, max_warmup_steps=1, warmup_interval=1, max_cached_steps=-1,
        max_continuous_cached_steps=2, max_accumulated_residual_diff_threshold=0.3, steps_computation_mask=None,
        steps_computation_policy="dynamic",
    ),
    [(diff, True, True) for diff in (0.1, 0.1, 0.1, 0.1, 0.3, 0.1, math.nan, 0.19, 0.19, 0.19)],
)  # fmt: skip
def test_every_session_matches_the_reference(fields, steps):
    config, history, record = CacheConfig(**fields), History(), []
    for diff, is_cached, has_moved in steps:
        known = history._replace(has_moved=has_moved)
        decision = decide(config, known, diff, is_cached=is_cached)
        expected = reference_decision(fields, record, diff, is_cached, has_moved)
        assert decision.reason == expected
        assert decision.compute == (expected not in REUSED)
        assert decision.probed == (expected in ("diff-below", "diff-above", "nan"))
        record.append((decision.reason, diff))
        history = known.after(decision)
        assert history.has_moved == has_moved
    assert history.num_steps == len(steps)
    assert history.num_cached == sum(reason in REUSED for reason, _ in record)
