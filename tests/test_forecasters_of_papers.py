"""HiCache, FreqCa and Spectrum equal the formulas of their papers, written in NumPy without the code of the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cachedit_fx
from cachedit_fx.config import BasicCacheConfig
from cachedit_fx.forecasters import (
    Forecaster,
    FreqCaCalibratorConfig,
    HiCacheCalibratorConfig,
    PolynomialCalibratorConfig,
    SpectrumCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
)
from cachedit_fx.forecasters.compile import CompiledForecaster
from tests import tiny
from tests.hybrid import moving
from tests.sessions import every_session
from tests.test_forecasters import PLANS, UNEVEN, Plan, close, eager, forecasts, polynomial

Steps = list[tuple[float, np.ndarray]]  # The computed steps, oldest first: position and value.
PAPERS = (HiCacheCalibratorConfig(), FreqCaCalibratorConfig(low_frequencies=0.5), SpectrumCalibratorConfig())


def tokens(position: float) -> np.ndarray:
    """A value with 2 samples, 9 tokens and 3 channels. A quarter of it does not depend on the position."""
    phases = np.random.default_rng(0).normal(size=(2, 9, 3))
    return np.sin(phases + position / 7) * np.cos(3 * phases) + phases / 4


# References.


def hermite(i: int, x: float) -> float:
    """The physicists' Hermite polynomial H_i, by its recurrence."""
    before, now = 0.0, 1.0
    for k in range(i):
        before, now = now, 2 * x * now - 2 * k * before
    return now


def hicache(steps: Steps, position: float, count: int, *, order: int, sigma: float) -> np.ndarray:
    """The forecast of the `count`-th step after the newest computed one, with a step as the unit of the positions.

    Distances are negative, as in the implementation of the paper: both they and the gaps count backwards.
    """
    unit = (position - steps[-1][0]) / count
    levels: list[list[np.ndarray]] = []
    for i, (at, value) in enumerate(steps):
        level = [value]
        for k in range(min(order, len(levels[-1]) if levels else 0)):
            level.append((level[k] - levels[-1][k]) / ((steps[i - 1][0] - at) / unit))
        levels.append(level)
    total = levels[-1][0].copy()
    for i, difference in enumerate(levels[-1][1:], start=1):
        total += difference * hermite(i, -sigma * count) * sigma**i / math.factorial(i)
    return total


def freqca(steps: Steps, position: float, count: int, *, order: int, sigma: float, low: float) -> np.ndarray:
    """The forecasts of the low and of the high frequencies, which are separated before anything is forecast."""

    def split(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frequencies = np.abs(np.fft.fftfreq(value.shape[-2]))
        is_low = (frequencies <= low * frequencies.max() + 1e-12)[:, None]
        spectrum = np.fft.fft(value, axis=-2)
        return np.fft.ifft(spectrum * is_low, axis=-2).real, np.fft.ifft(spectrum * ~is_low, axis=-2).real

    high = [(at, split(value)[1]) for at, value in steps]
    return split(steps[-1][1])[0] + hicache(high, position, count, order=order, sigma=sigma)


def spectrum(steps: Steps, position: float, *, order: int, ridge: float, horizon: float, blend: float) -> np.ndarray:
    """The forecast of the regression, by its normal equations, averaged with the line through the last two values."""

    end = max(horizon, position)

    def basis(at: float) -> np.ndarray:
        tau = 2 * at / end - 1
        return np.array([math.cos(m * math.acos(tau)) for m in range(order + 1)])

    phi = np.stack([basis(at) for at, _ in steps])
    values = np.stack([value for _, value in steps])
    sums = np.tensordot(phi.T, values, 1)
    coefficients = np.linalg.solve(phi.T @ phi + ridge * np.eye(order + 1), sums.reshape(order + 1, -1))
    fitted = (basis(position) @ coefficients).reshape(values.shape[1:])
    (before, old), (newest, new) = steps[-2:]
    line = new + (position - newest) / (newest - before) * (new - old)
    return blend * fitted + (1 - blend) * line


def expected(plan: Plan, memory: int, rule: Callable[[Steps, float, int], np.ndarray]) -> dict[float, np.ndarray]:
    """The forecast of every step that is not computed, from at most `memory` values."""
    found: dict[float, np.ndarray] = {}
    steps: Steps = []
    count = 0
    for position, is_computed in plan:
        if is_computed:
            steps, count = [*steps, (position, tokens(position))][-memory:], 0
        else:
            count += 1
            found[position] = rule(steps, position, count)
    return found


# Comparison with the references. Factors are float32, so the errors are a few roundings.


@pytest.mark.parametrize("plan", ["even", "uneven", "timesteps"])
@pytest.mark.parametrize(("order", "sigma"), [(0, 0.5), (1, 0.5), (2, 0.5), (2, 0.71), (3, 0.3)])
def test_hicache_equals_the_hermite_sum_of_its_differences(order: int, sigma: float, plan: str):
    def rule(steps: Steps, position: float, count: int) -> np.ndarray:
        return hicache(steps, position, count, order=order, sigma=sigma)

    forecaster = HiCacheCalibratorConfig(order=order, sigma=sigma)
    close(forecasts(forecaster, PLANS[plan], tokens), expected(PLANS[plan], order + 1, rule).get, 2e-5)


@pytest.mark.parametrize("low", [0.0, 0.3, 0.5, 1.0])
def test_freqca_forecasts_the_high_frequencies_and_repeats_the_low_ones(low: float):
    def rule(steps: Steps, position: float, count: int) -> np.ndarray:
        return freqca(steps, position, count, order=2, sigma=0.71, low=low)

    forecaster = FreqCaCalibratorConfig(low_frequencies=low)
    close(forecasts(forecaster, UNEVEN, tokens), expected(UNEVEN, 3, rule).get, 2e-5)


@pytest.mark.parametrize("plan", ["even", "uneven", "timesteps"])
@pytest.mark.parametrize(("memory", "share"), [(2, 1.1), (5, 1.1), (10, 1.1), (5, 0.6)])
def test_spectrum_equals_the_normal_equations_of_its_regression(memory: int, share: float, plan: str):
    horizon = share * max(position for position, _ in PLANS[plan])

    def rule(steps: Steps, position: float, count: int) -> np.ndarray:
        return spectrum(steps, position, order=4, ridge=0.1, horizon=horizon, blend=0.7)

    forecaster = SpectrumCalibratorConfig(memory=memory, horizon=horizon, blend=0.7)
    close(forecasts(forecaster, PLANS[plan], tokens), expected(PLANS[plan], memory, rule).get, 2e-5)


# Properties.


def signal_of(power: int) -> Callable[[float], np.ndarray]:
    return polynomial(*[0.6, -0.4, 0.3][: power + 1])


def test_hicache_of_order_1_is_taylorseer_if_sigma_is_the_root_of_one_half():
    times = Times((9.0, 7.0), 12.0, (10.0, 11.0))
    hermite_line = HiCacheCalibratorConfig(order=1, sigma=math.sqrt(0.5)).numbers(times)
    np.testing.assert_allclose(hermite_line, TaylorSeerCalibratorConfig(taylorseer_order=1).numbers(times))
    half = HiCacheCalibratorConfig(order=1, sigma=0.5).numbers(times)
    np.testing.assert_allclose(np.array(half) - [1, 0], (np.array(hermite_line) - [1, 0]) / 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 5), min_size=2, max_size=7), st.integers(1, 5), st.integers(1, 3), st.floats(0.1, 1))
def test_hicache_does_not_depend_on_the_unit_of_the_positions(gaps: list[float], count: int, order: int, scale: float):
    at = np.cumsum(gaps)[::-1][: order + 1]
    reused = [at[0] + 0.1 * k for k in range(1, count)]
    now = at[0] + 0.1 * count
    forecaster = HiCacheCalibratorConfig(order=order)
    one = forecaster.numbers(Times(tuple(at.tolist()), now, tuple(reused)))
    other = forecaster.numbers(Times(tuple((at * scale).tolist()), now * scale, tuple(scale * r for r in reused)))
    assert sum(one) == pytest.approx(1, abs=1e-9 * sum(map(abs, one)))
    np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6 * max(map(abs, one)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.3, 3), min_size=5, max_size=9), st.floats(0.1, 3), st.integers(1, 3))
def test_spectrum_without_a_ridge_is_the_polynomial_through_its_values(gaps: list[float], ahead: float, order: int):
    at = np.cumsum(gaps)[::-1][: order + 1].tolist()
    times = Times(tuple(at), at[0] + ahead)
    found = SpectrumCalibratorConfig(order=order, ridge=0.0, blend=1.0, horizon=30.0).numbers(times)
    wanted = PolynomialCalibratorConfig(order=order).numbers(times)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * max(map(abs, wanted)))


@pytest.mark.parametrize("plan", PLANS)
def test_hicache_and_freqca_forecast_a_constant_and_spectrum_draws_it_towards_zero(plan: str):
    for forecaster in PAPERS[:2]:
        close(forecasts(forecaster, PLANS[plan], signal_of(0)), signal_of(0), 3e-4)
    # The ridge of the paper applies to all coefficients, that of T_0 included.
    for _, found in forecasts(PAPERS[2], PLANS[plan], signal_of(0)):
        share = found / signal_of(0)(0)
        assert (share < 1).all() and (share > 0.6).all()


@pytest.mark.parametrize("forecaster", PAPERS, ids=repr)
def test_the_first_reused_step_repeats_the_only_value(forecaster: Forecaster):
    value = torch.tensor(tokens(0))
    compiled = CompiledForecaster(forecaster, eager)
    history = compiled.update((), value, ())
    assert compiled.predict(history, forecaster.numbers(Times((0.0,), 1.0))) is value
    assert len(forecaster.numbers(Times((0.0,), 1.0))) == 1


@pytest.mark.parametrize("forecaster", PAPERS, ids=repr)
def test_two_values_at_one_timestep_count_once(forecaster: Forecaster):
    factors = forecaster.numbers(Times((0.3, 0.3, 0.2), 0.3))
    assert factors[1] == 0 and np.isfinite(factors).all()
    if not isinstance(forecaster, SpectrumCalibratorConfig):
        np.testing.assert_allclose(sum(factors), 1)


@pytest.mark.parametrize("forecaster", PAPERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(forecaster: Forecaster, dtype: torch.dtype):
    values = [torch.tensor(tokens(t)) for t in range(forecaster.depth)]
    numbers = torch.tensor(forecaster.numbers(Times(tuple(range(forecaster.depth))[::-1], forecaster.depth)))
    halves = tuple(value.to(dtype) for value in reversed(values))
    found = forecaster.predict(halves, numbers)
    assert found.dtype == dtype
    assert torch.equal(found, forecaster.predict(tuple(h.float() for h in halves), numbers).to(dtype))


def test_a_value_without_tokens_is_repeated_by_freqca():
    history = tuple(torch.tensor([float(i), 2.0]) for i in range(3))
    assert FreqCaCalibratorConfig().predict(history, torch.tensor([3.0, -3.0, 1.0])) is history[0]


# In a model.


MASK = [1, 1, 1, 1, 1, 0, 1, 0]


def test_a_model_adds_the_forecast_and_counts_the_bytes_of_its_values():
    model, calls = tiny.build(), moving()

    def outputs(forecaster: Forecaster | None) -> tuple[list[Tensor], int]:
        fields = dict(steps_computation_mask=MASK, steps_computation_policy="static", inner_backend="eager")
        config = BasicCacheConfig(**fields, Fn_compute_blocks=1, forecaster=forecaster)
        cachedit_fx.enable_cache(model, config)
        with torch.no_grad():
            found = [model(**call)[0] for call in calls]
        return found, every_session(model)[-1].state_bytes

    plain, bytes_without = outputs(None)
    for forecaster in (*PAPERS, SpectrumCalibratorConfig(memory=4)):
        found, bytes_held = outputs(forecaster)
        for step, is_computed in enumerate(MASK):
            change = (found[step] - plain[step]).abs().max()
            assert change == 0 if is_computed else 1e-4 < change < 1
        num_more = min(forecaster.depth, sum(MASK)) - 1
        verdicts = 2 * tiny.BATCH  # One byte for each stream and sample.
        assert bytes_held == bytes_without + num_more * (tiny.STREAM_BYTES + tiny.TEXT_BYTES) + verdicts


@pytest.mark.slow
def test_inductor_compiles_the_transform_along_the_tokens():
    from torch._inductor.compile_fx import compile_fx

    forecaster = FreqCaCalibratorConfig(low_frequencies=0.5)
    history = tuple(torch.tensor(tokens(t), dtype=torch.float32) for t in (2, 1, 0))
    numbers = forecaster.numbers(Times((2.0, 1.0, 0.0), 4.0, (3.0,)))
    found = CompiledForecaster(forecaster, compile_fx).predict(history, numbers)
    torch.testing.assert_close(found, forecaster.predict(history, torch.tensor(numbers)), rtol=1e-5, atol=1e-5)
