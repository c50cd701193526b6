"""The dynamic programme: it agrees with an exhaustive search, and its costs are the errors of the schedules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from cachedit_fx.forecasters.forecaster import LinearForecaster, Times
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig
from cachedit_fx.tuning.problems import RecordedRun, problems_of, weights_of
from cachedit_fx.tuning.recording import Trajectory
from cachedit_fx.tuning.schedule import NUM_FIRST, Problem, best_schedules, cost_of

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


def every_schedule(count: int) -> Sequence[tuple[int, ...]]:
    first = tuple(range(NUM_FIRST))
    return [(*first, *rest) for rest in itertools.combinations(range(NUM_FIRST, NUM_STEPS), count - NUM_FIRST)]


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
