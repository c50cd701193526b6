"""Factors fitted to recorded generations, compared with NumPy's least squares, and their use in the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import (
    FittedCalibratorConfig,
    PolynomialCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
    as_mapping,
    forecaster_from,
)
from cachedit_fx.tuning.cached import config_of
from cachedit_fx.tuning.fit import Fitting, fitting
from cachedit_fx.tuning.schedule import Problem, Schedule, best_schedules, cost_of

NUM_STEPS = 12
COMPUTED = (0, 3, 4, 8)


def outputs(seed: int = 0, size: int = 200) -> NDArray[np.float64]:
    """Outputs that are smooth in the step but no polynomial of it."""
    rng = np.random.default_rng(seed)
    waves, moments = rng.normal(size=(4, size)), np.arange(NUM_STEPS)[:, None] / NUM_STEPS
    return np.exp(-2 * moments) * waves[0] + np.cos(3 * moments) * waves[1] + moments**1.5 * waves[2] + waves[3]


def problem(values: NDArray[np.float64]) -> Problem:
    return Problem(values @ values.T, np.full(NUM_STEPS, -1 / NUM_STEPS), tuple(map(float, range(NUM_STEPS))))


def fitted(values: NDArray[np.float64], memory: int = 3) -> FittedCalibratorConfig:
    searched = fitting(FittedCalibratorConfig(memory=memory), [problem(values)])
    assert isinstance(searched, Fitting)
    return searched.fixed(Schedule(searched, COMPUTED, NUM_STEPS))


def before(step: int, memory: int = 3) -> list[int]:
    return [number for number in COMPUTED if number < step][::-1][:memory]


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_the_factors_are_those_of_least_squares(memory):
    values = outputs()
    forecaster = fitted(values, memory)
    for step in {*range(NUM_STEPS)} - {*COMPUTED}:
        known = before(step, memory)
        expected, *_ = np.linalg.lstsq(values[known].T, values[step], rcond=None)
        found = forecaster.numbers(Times(tuple(map(float, known)), float(step)))
        np.testing.assert_allclose(values[known].T @ found, values[known].T @ expected, atol=1e-3)
    assert [len(row) for row in forecaster.factors] == [min(memory, len(before(step))) for step in range(NUM_STEPS)]


def test_the_fit_is_at_least_as_good_as_a_polynomial():
    """For the generations that were fitted; the ridge has almost no effect."""
    values = outputs()
    given, searched = [problem(values)], fitting(FittedCalibratorConfig(), [problem(values)])
    for forecaster in (PolynomialCalibratorConfig(order=2), TaylorSeerCalibratorConfig(taylorseer_order=2)):
        for count, schedule in best_schedules(given, forecaster).items():
            assert cost_of(given, searched, schedule.computed) <= schedule.cost + 1e-9, count


def test_similar_generations_are_forecast_better_than_by_a_polynomial():
    given, unseen = [problem(outputs(seed)) for seed in range(3)], [problem(outputs(9))]
    searched, quadratic = fitting(FittedCalibratorConfig(), given), PolynomialCalibratorConfig(order=2)
    schedule = best_schedules(given, searched)[5]
    forecaster = searched.fixed(schedule)
    assert cost_of(unseen, forecaster, schedule.computed) < 0.5 * best_schedules(unseen, quadratic)[5].cost


def test_a_schedule_becomes_a_configuration_that_can_be_written_to_a_file():
    searched = fitting(FittedCalibratorConfig(), [problem(outputs())])
    config = config_of(best_schedules([problem(outputs())], searched)[5], ["transformer"])
    forecaster = config.forecaster
    assert isinstance(forecaster, FittedCalibratorConfig) and len(forecaster.computed) == 5
    assert forecaster_from(as_mapping(forecaster)) == forecaster
    assert hash(forecaster) == hash(forecaster_from(as_mapping(forecaster)))


@pytest.mark.parametrize("computed", [(4.0, 2.0, 0.0), (4.0, 3.0), (5.0, 4.0, 3.0)])
def test_a_line_is_used_after_steps_other_than_the_fitted_ones(computed):
    forecaster, times = fitted(outputs()), Times(computed, 6.0)
    line = PolynomialCalibratorConfig(order=1).numbers(Times(computed[:2], 6.0))
    fits = list(computed) == before(6)[: len(computed)] and len(computed) == len(before(6))
    assert not fits
    np.testing.assert_allclose(forecaster.numbers(times), [*line, *[0.0] * (len(computed) - 2)])


def test_a_step_without_fitted_factors_repeats_the_last_value():
    forecaster = fitted(outputs())
    rows = [() if step in COMPUTED else row for step, row in enumerate(forecaster.factors)]
    without = FittedCalibratorConfig(computed=COMPUTED, factors=rows)
    assert without.numbers(Times((4.0, 3.0, 0.0), 8.0)) == [1.0, 0.0, 0.0]
    assert without.numbers(Times((4.0, 3.0, 0.0), 6.0)) == forecaster.numbers(Times((4.0, 3.0, 0.0), 6.0))


def test_a_line_is_used_beyond_the_last_fitted_step():
    assert fitted(outputs()).numbers(Times((8.0, 4.0, 3.0), 30.0)) == pytest.approx([6.5, -5.5, 0.0])


def test_predict_returns_the_sum_weighted_by_the_factors():
    history = tuple(torch.randn(2, 3) for _ in range(3))
    forecaster = fitted(outputs())
    numbers = forecaster.numbers(Times((4.0, 3.0, 0.0), 6.0))
    expected = sum(factor * tensor for factor, tensor in zip(numbers, history, strict=True))
    torch.testing.assert_close(forecaster.predict(history, torch.tensor(numbers)), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": 0}, "memory must be an int >= 1, got 0"),
        ({"by": "timestep"}, "by must be 'step', because factors belong to steps"),
        ({"computed": 3}, "computed must be a list"),
        ({"factors": [[1.0, 2.0, 3.0, 4.0]]}, "at most memory=3 finite numbers"),
        ({"factors": [["a"]]}, "at most memory=3 finite numbers"),
        ({"factors": [1.0]}, "at most memory=3 finite numbers"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        FittedCalibratorConfig(**fields)
