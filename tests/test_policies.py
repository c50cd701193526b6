"""The rules besides the threshold, user-defined policies, and the properties that hold under all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.config.cache_config import check_together
from cachedit_fx.errors import ConfigError
from cachedit_fx.policies import Decision, History, StepView, decide, needs_refresh
from cachedit_fx.policies.budget import rescaled
from tests import hybrid, tiny
from tests.sessions import every_session

RATIOS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3)
MAGNITUDE = dict(probe="timestep", decision_rule="budget", magnitude_ratios=RATIOS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def run(config: CacheConfig, diffs: list[float], *, still: int = 0) -> list[Decision]:
    """The decisions of a session that has a cached value after its first step."""
    history, found = History(), []
    for number, diff in enumerate(diffs):
        if needs_refresh(config, history):
            history = history.refreshed()
        known = history._replace(has_moved=number > still)
        found.append(decide(config, known, diff, is_cached=history.num_steps > 0))
        history = known.after(found[-1])
    return found


def as_string(decisions: list[Decision]) -> str:
    return "".join("." if decision.compute else "C" for decision in decisions)


def budget(**fields: Any) -> CacheConfig:
    return CacheConfig(**dict(decision_rule="budget", max_warmup_steps=1, residual_diff_threshold=0.25) | fields)


def magnitude(**fields: Any) -> CacheConfig:
    return CacheConfig(**MAGNITUDE | dict(max_warmup_steps=1, residual_diff_threshold=0.15) | fields)


# The budget.


@pytest.mark.parametrize(
    ("diffs", "fields", "expected"),
    [
        pytest.param([9, 0.125, 0.0625, 0.0625, 0.125, 0.1], {}, ".CC.CC", id="an-equal-sum-is-above-and-resets"),
        pytest.param([9, 0.5, 0.1, 0.1, 0.1], {}, "..CC.", id="a-computed-step-resets-the-sum"),
        pytest.param([9, 0.9, 0.9, 0.9], {"residual_diff_threshold": 2.0}, ".CC.", id="above-1-it-is-an-ordinary-sum"),
        pytest.param([9, 0.0, 0.0], {"residual_diff_threshold": 0.0}, "...", id="nothing-to-spend"),
        pytest.param([9, 0.1, math.nan, 0.1, 0.1], {}, ".C.CC", id="nan-computes"),
        pytest.param([9, 0.1, math.inf, 0.1], {}, ".C.C", id="infinite"),
        pytest.param([9, 0.1, 0.1, 0.1], {"rescale_coefficients": (2.0, 0.0)}, ".C.C", id="twice-the-diff"),
        pytest.param(
            [9, 0.1, 0.1, 0.1], {"rescale_coefficients": (1.0, 0.0, 0.1)}, ".CC.", id="a-square-and-a-constant"
        ),
        pytest.param([9, math.nan, 0.1], {"rescale_coefficients": (0.1,)}, "..C", id="a-constant-of-nan-computes"),
        pytest.param([9] + [0.01] * 5, {"max_continuous_cached_steps": 2}, ".CC.CC", id="in-a-row"),
        pytest.param([9] + [0.01] * 5, {"max_cached_steps": 3}, ".CCC..", id="in-all"),
        pytest.param([9] + [0.01] * 5, {"max_warmup_steps": 3}, "...CCC", id="warm-up"),
        pytest.param([9] + [0.01] * 5, {"steps_computation_mask": [1, 0, 1, 0]}, ".C.CCC", id="mask"),
        pytest.param(
            [9, 0.1, 0.1, 0.1], {"max_accumulated_residual_diff_threshold": 0.1}, ".C.C", id="accumulated-limit"
        ),
        pytest.param([9, 0.1, 0.1, 0.1, 0.1], {"force_refresh_step_hint": 2}, ".C.CC", id="a-refresh-spends-nothing"),
    ],
)
def test_a_budget_gives_the_expected_decisions(diffs: list[float], fields: dict[str, Any], expected: str) -> None:
    assert as_string(run(budget(**fields), diffs)) == expected


def test_a_budget_reports_the_accumulated_amount() -> None:
    found = run(budget(), [9, 0.125, 0.0625, 0.0625, math.nan])
    assert [d.reason for d in found] == ["warmup", "budget-below", "budget-below", "budget-above", "nan"]
    assert [d.accumulated for d in found[:4]] == [None, 0.125, 0.1875, 0.25]
    assert all(d.probed and d.threshold == 0.25 for d in found[1:])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-5, 5), max_size=4), st.floats(0, 3))
def test_a_polynomial_is_evaluated_as_numpy_does(coefficients: list[float], diff: float) -> None:
    expected = sum(c * diff**i for i, c in enumerate(reversed(coefficients))) if coefficients else diff
    assert rescaled(coefficients, diff) == pytest.approx(expected, abs=1e-9)


# The magnitudes.


def by_mag_cache(ratios: tuple[float, ...], threshold: float, total: int) -> str:
    """The loop of MagCache: errors |1 - accumulated ratio| accumulate, and a computed step resets both."""
    found, ratio, error = ".", 1.0, 0.0
    for step in range(1, total):
        ratio *= ratios[step]
        error += abs(1 - ratio)
        if error < threshold:
            found += "C"
        else:
            found += "."
            ratio, error = 1.0, 0.0
    return found


@pytest.mark.parametrize("threshold", [0.005, 0.05, 0.15, 0.4, 2.0])
def test_magnitude_decisions_match_mag_cache(threshold: float) -> None:
    found = run(magnitude(residual_diff_threshold=threshold), [math.nan] * len(RATIOS))
    assert as_string(found) == by_mag_cache(RATIOS, threshold, len(RATIOS))
    assert not any(d.probed for d in found)


def test_steps_beyond_the_last_magnitude_are_computed() -> None:
    found = run(magnitude(residual_diff_threshold=9.0), [math.nan] * (len(RATIOS) + 2))
    assert as_string(found) == "." + "C" * (len(RATIOS) - 1) + ".."
    assert [d.reason for d in found[-3:]] == ["ratios-below", "ratios-end", "ratios-end"]


def test_a_refresh_does_not_restart_the_magnitudes() -> None:
    ratios = (1.0, 1.0, 1.0, 1.0, 0.5, 1.0)
    config = magnitude(magnitude_ratios=ratios, residual_diff_threshold=0.1, force_refresh_step_hint=2)
    assert as_string(run(config, [math.nan] * 6)) == ".C.C.C"


# Properties of every rule.

RULES = {
    "threshold": {},
    "budget": dict(decision_rule="budget"),
    "rescaled": dict(decision_rule="budget", rescale_coefficients=(1.0, 1.0, 0.0)),
    "magnitude": MAGNITUDE,
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(RULES)),
    st.fixed_dictionaries(
        dict(
            residual_diff_threshold=st.sampled_from([-1.0, 0.0, 0.1, 0.5, 1.0, 4.0]),
            max_warmup_steps=st.integers(0, 4),
            max_cached_steps=st.integers(-1, 4),
            max_continuous_cached_steps=st.integers(-1, 3),
            steps_computation_mask=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=10),
        )
    ),
    st.lists(st.floats(0, 0.4) | st.sampled_from([math.nan, math.inf]), max_size=14),
    st.integers(0, 2),
)
def test_limits_apply_under_every_rule(rule: str, fields: dict[str, Any], diffs: list[float], still: int) -> None:
    config = CacheConfig(**RULES[rule] | fields)
    found = run(config, diffs, still=still)
    assert found == run(config, diffs, still=still)
    steps = as_string(found)
    mask = config.steps_computation_mask
    warmup = min(config.max_warmup_steps, (*mask, 0).index(0)) if mask is not None else config.max_warmup_steps
    assert "C" not in steps[: max(warmup, still + 1)]
    assert mask is None or all(step == "." for step, bit in zip(steps, mask, strict=False) if bit)
    assert steps.count("C") <= config.max_cached_steps or config.max_cached_steps < 0
    assert (
        max(map(len, steps.split("."))) <= config.max_continuous_cached_steps or config.max_continuous_cached_steps < 0
    )
    assert config.residual_diff_threshold > 0 or "C" not in steps
    spent = 0.0
    for decision, diff in zip(found, diffs, strict=True):
        if decision.probed and diff != diff:
            assert decision.compute
        if not decision.compute and config.decision_rule == "budget":
            assert decision.accumulated is not None
            assert spent <= decision.accumulated < config.residual_diff_threshold
        spent = 0.0 if decision.compute else decision.accumulated or 0.0


# User-defined policies.


@dataclass(eq=False)
class Scripted:
    """Returns the given answers in order, and records the step views."""

    answers: list[Any]
    views: list[StepView] = field(default_factory=list)

    def decide(self, step: StepView) -> bool | None:
        self.views.append(step)
        return self.answers[(len(self.views) - 1) % len(self.answers)]


def test_a_decider_overrides_warmup_masks_and_limits_but_needs_a_cached_value() -> None:
    config = CacheConfig(max_warmup_steps=9, max_cached_steps=0, decider=Scripted([False]))
    reasons = [d.reason for d in run(config, [0.5] * 4, still=1)]
    assert reasons == ["nothing-stored", "timestep-still", "decider-reuse", "decider-reuse"]


def test_none_leaves_the_decision_to_the_rules_and_true_computes() -> None:
    config = CacheConfig(max_warmup_steps=1, residual_diff_threshold=0.1, decider=Scripted([None, None, True, None]))
    reasons = [d.reason for d in run(config, [0.0, 0.05, 0.05, 0.2])]
    assert reasons == ["warmup", "diff-below", "decider-compute", "diff-above"]


def test_the_step_view_of_a_decider_accumulates_the_diffs() -> None:
    decider = Scripted([True, False, False, True])
    run(CacheConfig(residual_diff_threshold=0.3, num_inference_steps=8, decider=decider), [math.inf, 0.25, 0.5, 0.125])
    first, *others = decider.views
    assert (first.number, first.is_cached, first.diff != first.diff) == (0, False, True)
    assert [(v.number, v.diff, v.history.accumulated_diff) for v in others] == [
        (1, 0.25, 0),
        (2, 0.5, 0.25),
        (3, 0.125, 0.75),
    ]
    assert all((v.threshold, v.num_inference_steps) == (0.3, 8) for v in decider.views)


@pytest.mark.parametrize("answer", [1, "reuse", torch.tensor(True)])
def test_an_invalid_answer_of_a_decider_raises(answer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"decider must return True \(compute\), False .* got .* from Scripted.decide"
    ):
        run(CacheConfig(decider=Scripted([answer])), [0.0])


class Every:
    """Computes every `period`-th step, without a probe."""

    def __init__(self, period: int) -> None:
        self.period = period

    def decide(self, step: StepView) -> bool | None:
        return step.number % self.period == 0


def test_a_model_runs_under_a_user_defined_policy() -> None:
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config(), decider=Every(3))
    hybrid.generate(model)
    (stats,) = every_session(model)
    assert stats.cached_steps == [1, 2, 4, 5, 7]
    assert stats.decisions[:2] == ["decider-compute", "decider-reuse"]
    cachedit_fx.refresh_context(model, decider=Every(2))
    hybrid.generate(model)
    assert every_session(model)[-1].cached_steps == [1, 3, 5, 7]


def test_an_error_in_a_decider_reaches_the_caller_and_does_not_change_the_session() -> None:
    class Stops:
        fails = False

        def decide(self, step: StepView) -> bool | None:
            if self.fails:
                raise KeyError("mine")
            return None

    decider = Stops()
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config(), decider=decider)
    first, second, *_ = hybrid.calls()
    model(**first)
    decider.fails = True
    with pytest.raises(KeyError, match="mine"):
        model(**second)
    decider.fails = False
    model(**second)
    assert every_session(model)[-1].decisions == ["warmup", "threshold-one"]


def test_a_decider_receives_the_region_and_the_timestep() -> None:
    decider = Scripted([None])
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config(regions="per_list"), decider=decider)
    hybrid.generate(model, (1.0, 0.75))
    assert [(v.region, v.timestep) for v in decider.views] == [
        (region, time) for time in (1.0, 0.75) for region in ("blocks[1:3]", "single_blocks[1:3]")
    ]


# In a model.


def test_a_budget_accumulates_the_changes_from_step_to_step() -> None:
    model = cachedit_fx.enable_cache(
        tiny.build(), tiny.config(decision_rule="budget", residual_diff_threshold=0.12, max_warmup_steps=1)
    )
    tiny.generate(model, tiny.prompt(), tiny.latents())
    (stats,) = every_session(model)
    # The latents stay the same, so the probe is (1 + t) times a constant.
    changes = [abs(t - s) / (1 + s) for s, t in zip(tiny.TIMES, tiny.TIMES[1:], strict=False)]
    assert list(stats.residual_diffs.values()) == pytest.approx(changes, rel=1e-4)
    spent, expected = 0.0, []
    for step, change in enumerate(changes, start=1):
        spent += change
        if spent < 0.12:
            expected.append(step)
        else:
            spent = 0.0
    assert stats.cached_steps == expected and 2 < len(expected) < 7
    assert stats.accumulated[1] == pytest.approx(changes[0], rel=1e-4)
    assert stats.accumulated[2] == pytest.approx(sum(changes[:2]), rel=1e-4)


# Combinations of fields.


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param(dict(probe="none"), "probe='none' measures nothing, so it needs", id="nothing"),
        pytest.param(
            dict(probe="none", steps_computation_mask=[1, 0]),
            r"got \(1, 0\) and 'dynamic'",
            id="dynamic",
        ),
        pytest.param(dict(probe="timestep"), r"magnitude_ratios=\(\) and decision_rule='threshold'", id="no-ratios"),
        pytest.param(MAGNITUDE | dict(decision_rule="threshold"), "need each other", id="ratios-and-a-threshold"),
        pytest.param(MAGNITUDE | dict(probe="fn_residual"), "need each other", id="ratios-without-the-probe"),
        pytest.param(dict(cache_type="DBPrune", probe="none"), "probe must be 'fn_residual' with", id="pruning"),
        pytest.param(dict(rescale_coefficients=[1.0]), r"must be \(\) unless decision_rule='budget'", id="polynomial"),
        pytest.param(dict(reach="output", Bn_compute_blocks=2), "got 2 and 'DBCache'", id="output-and-bn"),
        pytest.param(dict(reach="output", cache_type="DBPrune"), "got 0 and 'DBPrune'", id="output-and-pruning"),
        pytest.param(dict(Fn_compute_blocks=0, decision_rule="budget"), "Fn_compute_blocks=0 leaves", id="no-fn"),
    ],
)
def test_fields_that_exclude_each_other_raise(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_together(CacheConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(Fn_compute_blocks=0, probe="modulated_input"),
        MAGNITUDE | dict(Fn_compute_blocks=0),
        dict(probe="none", Fn_compute_blocks=0, steps_computation_mask=[1, 0], steps_computation_policy="static"),
        dict(probe="none", Fn_compute_blocks=0, decider=Every(2)),
        dict(reach="output"),
        dict(decision_rule="budget", rescale_coefficients=[1.0, 0.0]),
    ],
)
def test_compatible_fields_are_accepted(fields: dict[str, Any]) -> None:
    check_together(CacheConfig(**fields))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("reach", "all", "'blocks', 'output'"),
        ("probe", "fn-residual", "Did you mean 'fn_residual'?"),
        ("batch_decision", "max", "'mean', 'any'"),
        ("decision_rule", None, "'threshold', 'budget'"),
        ("rescale_coefficients", (1, math.nan), "a list of finite numbers"),
        ("rescale_coefficients", "poly", "a list of finite numbers"),
        ("magnitude_ratios", (1, 0), "a list of numbers > 0"),
        ("magnitude_ratios", {1: 2}, "a list of numbers > 0"),
        ("forecaster", 3, "a Forecaster, its name or its mapping, or None"),
        ("forecaster", {"type": "taylor"}, "taylorseer"),
        ("decider", 3, "a hashable object with a method decide(step), or None"),
        ("decider", Every, "a hashable object with a method decide(step), or None"),
    ],
)
def test_an_invalid_value_raises_an_error_that_names_the_field(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**{name: value})
    assert str(caught.value).startswith(f"cachedit_fx: {name}")
    assert says in str(caught.value)
