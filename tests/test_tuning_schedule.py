"""The dynamic programme: it agrees with an exhaustive search, and its costs are the errors of the schedules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig
from cachedit_fx.tuning.fit import Fitting, fitting, parts_of
from cachedit_fx.tuning.guided import guided_cost, guided_schedules
from cachedit_fx.tuning.problems import RecordedRun, problems_of, weights_of
from cachedit_fx.tuning.recording import Trajectory, joint_gram
from cachedit_fx.tuning.schedule import NUM_FIRST, Problem, Schedule, best_schedules, cost_of, scale_of

NUM_STEPS = 9
FORECASTERS = [
    *(PolynomialCalibratorConfig(order=order, by="timestep") for order in (0, 1, 2, 3)),
    TaylorSeerCalibratorConfig(taylorseer_order=2),
]


def outputs(seed: int = 0) -> np.ndarray:
    """A smooth curve in 12 dimensions, [NUM_STEPS, 12]."""
    generator = np.random.default_rng(seed)
    t = np.linspace(0, 1, NUM_STEPS)[:, None]
    return sum(generator.normal(size=12) * np.sin((k + 1) * t + generator.normal(size=12)) for k in range(4))


def problem(seed: int = 0, gains: bool = True) -> Problem:
    values, generator = outputs(seed), np.random.default_rng(100 + seed)
    positions = np.cumsum(generator.uniform(0.5, 1.5, NUM_STEPS))
    return Problem(
        values @ values.T,
        generator.uniform(0.5, 1.5, NUM_STEPS),
        tuple(positions - positions[0]),
        generator.uniform(0.5, 2, NUM_STEPS) if gains else None,
    )


def every_schedule(count: int, starts: tuple[int, ...] = (0,)) -> Sequence[tuple[int, ...]]:
    first = tuple(range(NUM_FIRST))
    rests = itertools.combinations(range(NUM_FIRST, NUM_STEPS), count - NUM_FIRST)
    return [computed for rest in rests if {*(computed := (*first, *rest))} >= {*starts}]


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=lambda f: f"{type(f).__name__}-{f.depth}")
def test_the_search_finds_the_same_schedule_as_exhaustive_search(forecaster: LinearForecaster):
    problems = [problem(0), problem(1)]
    table = best_schedules(problems, forecaster)
    assert sorted(table) == list(range(NUM_FIRST, NUM_STEPS))
    for count, schedule in table.items():
        costs = {computed: cost_of(problems, forecaster, computed) for computed in every_schedule(count)}
        assert len(schedule.computed) == count == sum(schedule.mask)
        # The two sum in different orders.
        assert schedule.cost == pytest.approx(min(costs.values()), rel=1e-9, abs=1e-15)
        assert costs[schedule.computed] == pytest.approx(schedule.cost, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("forecaster", FORECASTERS[1:3], ids=lambda f: f"order-{f.order}")
def test_no_forecast_crosses_from_one_transformer_to_the_next(forecaster: LinearForecaster):
    problems = [dataclasses.replace(problem(seed), starts=(0, 4)) for seed in (0, 1)]
    table = best_schedules(problems, forecaster)
    assert sorted(table) == list(range(2, NUM_STEPS))
    for count, schedule in table.items():
        assert schedule.starts == (0, 4) and {0, 4} <= {*schedule.computed}
        costs = [cost_of(problems, forecaster, computed) for computed in every_schedule(count, (0, 4))]
        assert schedule.cost == pytest.approx(min(costs), rel=1e-9, abs=1e-15)
    # The outputs of the first transformer have no effect on the second one.
    one, computed = problems[0], (0, 1, 3, 4, 6)
    other = dataclasses.replace(one, gram=one.gram.copy())
    other.gram[3, 4:] = other.gram[4:, 3] = 0.0
    costs = [cost_of([each], forecaster, computed) * scale_of(each) for each in (one, other)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-12)


def test_each_transformer_has_the_factors_of_its_own_steps():
    values = outputs()
    fitted = Fitting(memory=2, gram=values @ values.T)
    first, second = parts_of(Schedule(fitted, (0, 2, 4, 5), NUM_STEPS, starts=(0, 4)))
    assert (first.computed, first.num_steps, second.computed, second.num_steps) == ((0, 2), 4, (0, 1), 5)
    times = Times((1.0, 0.0), 3.0)  # The steps 5, 4 and 7 of the generation.
    expected = np.linalg.lstsq(values[[5, 4]].T, values[7], rcond=None)[0]
    np.testing.assert_allclose(second.forecaster.numbers(times), expected, rtol=1e-3)


def test_the_cost_of_a_gap_is_the_error_of_its_accumulated_outputs():
    values, one = outputs(), problem(gains=False)
    forecaster, computed = PolynomialCalibratorConfig(order=1, by="timestep"), (0, 1, 4, 7)
    total = 0.0
    for gap in ((2, 3), (5, 6), (8,)):
        missed = np.zeros(12)
        for step in gap:
            known = [s for s in computed if s < step][::-1][:2]
            factors = forecaster.numbers(Times(tuple(one.positions[s] for s in known), one.positions[step]))
            forecast = sum(f * values[s] for f, s in zip(factors, known, strict=True))
            missed += one.weights[step] * (forecast - values[step])
        total += missed @ missed
    whole = one.weights @ values
    assert cost_of([one], forecaster, computed) == pytest.approx(total / (whole @ whole), rel=1e-9)


def test_outputs_on_a_parabola_cost_nothing_with_the_right_order():
    at = np.array([0.0, 1, 3, 4, 6, 7, 9, 10, 12])
    values = np.stack([at**power for power in range(3)], axis=1) @ np.random.default_rng(0).normal(size=(3, 12))
    one = Problem(values @ values.T, np.ones(NUM_STEPS), tuple(at))
    table = best_schedules([one], PolynomialCalibratorConfig(order=2, by="timestep"))
    assert max(table[count].cost for count in range(5, NUM_STEPS)) < 1e-12  # The Gram matrix is rounded.
    assert table[1].cost > 1e-3


def test_the_search_is_fast_for_a_long_generation():
    t = np.linspace(0, 3, 60)[:, None]
    values = np.sin(t * np.arange(1, 9))
    one = Problem(values @ values.T, np.ones(60), tuple(map(float, range(60))))
    table = best_schedules([one], PolynomialCalibratorConfig(order=2))
    costs = [table[count].cost for count in sorted(table) if count >= 8]
    assert costs[0] > costs[10] > costs[20]


class Scheduler:
    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = sigmas


@pytest.mark.parametrize(
    ("scheduler", "timesteps", "expected"),
    [
        pytest.param(Scheduler([1, 0.6, 0.3, 0]), [1000, 600, 300], [-0.4, -0.3, -0.3], id="sigmas"),
        pytest.param(Scheduler([1, 0.8, 0.6, 0.3, 0]), [600, 300], [-0.3, -0.3], id="starts-in-the-middle"),
        pytest.param(Scheduler([np.inf, 0.6, 0.3, 0]), [900, 600, 300], [-300, -300, -300], id="no-finite-sigmas"),
        pytest.param(None, [900, 500, 300], [-400, -200, -300], id="timesteps"),
        pytest.param(None, None, [1, 1, 1], id="nothing"),
    ],
)
def test_weights_are_the_step_sizes_of_the_scheduler(scheduler, timesteps, expected):
    np.testing.assert_allclose(weights_of(scheduler, timesteps, len(expected)), expected, rtol=1e-12)


def test_generations_with_the_same_timesteps_are_one_problem_with_equal_weights():
    grams = [outputs(seed) @ outputs(seed).T * scale for seed, scale in ((0, 1.0), (1, 100.0))]
    moments, weights = tuple(np.linspace(1, 0.1, NUM_STEPS)), np.ones(NUM_STEPS)
    recorded = [RecordedRun(Trajectory(gram, moments), weights) for gram in grams]
    (both,) = problems_of(recorded, "timestep")
    assert both.positions[0] == 0 and both.positions[-1] == pytest.approx(0.9)
    scaled = [gram / (weights @ gram @ weights) for gram in grams]
    np.testing.assert_allclose(both.gram, (scaled[0] + scaled[1]) / 2)
    other = RecordedRun(Trajectory(grams[0], tuple(np.linspace(1, 0.2, NUM_STEPS))), weights)
    assert len(problems_of([*recorded, other], "timestep")) == 2
    assert len(problems_of([*recorded, other], "step")) == 1


# Guidance reuse.


def branches(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The outputs of two guidance branches, and those after guidance with a scale of 3, each [NUM_STEPS, 12]."""
    first, second = outputs(seed), outputs(seed) + 0.3 * outputs(seed + 1)
    return first, second, 3.0 * first - 2.0 * second


def test_the_joint_products_are_those_of_what_the_second_branch_adds():
    first, second, guided = branches()
    joint = joint_gram(np.concatenate([guided, first, second]) @ np.concatenate([guided, first, second]).T)
    both = np.concatenate([guided, -2.0 * (second - first)])
    np.testing.assert_allclose(joint, both @ both.T, rtol=1e-6, atol=1e-6)
    rescaled = np.concatenate([guided / np.linalg.norm(guided, axis=1, keepdims=True), first, second])
    assert joint_gram(rescaled @ rescaled.T) is None
    assert joint_gram(np.ones((3 * NUM_STEPS, 3 * NUM_STEPS))) is None  # Equal branches.


@pytest.mark.parametrize("kind", ["linear", "fitted"])
def test_the_cost_with_guided_steps_is_the_error_of_the_guided_output(kind: str):
    first, second, guided = branches()
    both = np.concatenate([guided, guided - first])
    one = dataclasses.replace(problem(gains=False), gram=guided @ guided.T, joint=both @ both.T)
    if kind == "fitted":
        one = dataclasses.replace(one, positions=tuple(map(float, range(NUM_STEPS))))  # Its factors belong to steps.
    linear = PolynomialCalibratorConfig(order=1, by="timestep")
    forecaster = linear if kind == "linear" else fitting(FittedCalibratorConfig(memory=2), [one])
    schedule = Schedule(forecaster, (0, 1, 4, 6), NUM_STEPS, guided=(4,))

    def factors(known: list[int], step: int, values: np.ndarray) -> Any:
        if kind == "fitted":
            return np.linalg.lstsq(values[known].T, values[step], rcond=None)[0]
        return linear.numbers(Times(tuple(one.positions[s] for s in known), one.positions[step]))

    made = {step: guided[step] for step in schedule.computed}
    difference = second - first
    forecast = np.array(factors([1, 0], 4, difference)) @ difference[[1, 0]]
    made[4] = 3.0 * first[4] - 2.0 * (first[4] + forecast)
    total = 0.0
    for newest, reused in ((1, (2, 3)), (4, (5,)), (6, (7, 8))):
        missed = one.weights[newest] * (made[newest] - guided[newest])
        for step in reused:
            known = [s for s in schedule.computed if s < step][::-1][:2]
            value = np.array(factors(known, step, guided)) @ np.stack([made[s] for s in known])
            missed = missed + one.weights[step] * (value - guided[step])
        total += missed @ missed
    whole = one.weights @ guided
    assert guided_cost([one], schedule) == pytest.approx(total / (whole @ whole), rel=1e-3)
    assert guided_cost([one], dataclasses.replace(schedule, guided=())) == pytest.approx(
        cost_of([one], forecaster, schedule.computed), rel=1e-6
    )


def test_guided_steps_are_added_in_the_order_of_their_error():
    first, _, guided = branches()
    both = np.concatenate([guided, guided - first])
    one = dataclasses.replace(problem(), gram=guided @ guided.T, joint=both @ both.T, starts=(0, 4))
    schedule = Schedule(PolynomialCalibratorConfig(order=1, by="timestep"), (0, 2, 4, 6, 7), NUM_STEPS, starts=(0, 4))
    found = [*guided_schedules([one], schedule)]
    assert [len(each.guided) for each in found] == [1, 2, 3] and {*found[-1].guided} == {2, 6, 7}
    assert all({*less.guided} < {*more.guided} for less, more in itertools.pairwise(found))
    assert [each.share_computed for each in found] == [4.5 / 9, 4 / 9, 3.5 / 9]
    alone = [dataclasses.replace(schedule, guided=(step,)) for step in (2, 6, 7)]
    assert found[0].cost == min(guided_cost([one], each) for each in alone)
    assert [*guided_schedules([dataclasses.replace(one, joint=None)], schedule)] == []


def test_the_factors_of_a_guided_step_are_those_of_the_difference():
    first, _, guided = branches()
    both = np.concatenate([guided, guided - first])
    one = dataclasses.replace(problem(), gram=guided @ guided.T, joint=both @ both.T)
    fitted = fitting(FittedCalibratorConfig(memory=2), [one])
    (part,) = parts_of(Schedule(fitted, (0, 1, 4, 6), NUM_STEPS, guided=(4,)))
    known = (1.0, 0.0)
    assert list(part.forecaster.numbers(Times(known, 4.0))) == fitted.of_differences().numbers(Times(known, 4.0))
    assert list(part.forecaster.numbers(Times(known, 3.0))) == fitted.numbers(Times(known, 3.0))
    assert list(part.forecaster.numbers(Times((4.0, 1.0), 5.0))) == fitted.numbers(Times((4.0, 1.0), 5.0))
    assert fitted.numbers(Times(known, 4.0)) != fitted.of_differences().numbers(Times(known, 4.0))
