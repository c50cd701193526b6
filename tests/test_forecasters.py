"""Forecasters equal plain recurrences in NumPy, and are exact for the functions that they are made for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from cachedit_fx.forecasters import (
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    Forecaster,
    PolynomialCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
)
from cachedit_fx.forecasters.compile import CompiledForecaster

Signal = Callable[[float], np.ndarray]
Plan = list[tuple[float, bool]]  # For each step its position and whether it is computed.

BUILT_IN = (
    TaylorSeerCalibratorConfig(taylorseer_order=1),
    TaylorSeerCalibratorConfig(taylorseer_order=3),
    PolynomialCalibratorConfig(order=2),
    FoCaCalibratorConfig(),
    DMDCalibratorConfig(),
)

# Step numbers as positions; timesteps as positions; each timestep twice, as with a second-order scheduler.
EVEN: Plan = [(s, s < 4 or s % 3 == 0) for s in range(20)]
UNEVEN: Plan = [(s, s in (0, 1, 2, 5, 6, 11, 13)) for s in range(18)]
TIMESTEPS: Plan = [(1000 * (1 - 0.9**s), s in (0, 1, 2, 4, 7, 8, 12)) for s in range(16)]
TWICE: Plan = [(0.1 * (s // 2), s in (0, 1, 2, 3, 6, 7, 12)) for s in range(16)]
PLANS = {"even": EVEN, "uneven": UNEVEN, "timesteps": TIMESTEPS, "twice": TWICE}


def eager(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
    return graph.forward


def forecasts(
    forecaster: Forecaster, plan: Plan, signal: Signal, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[float, np.ndarray]]:
    """Position and forecast of every step that is not computed, as the runtime requests them."""
    compiled = CompiledForecaster(forecaster, eager)
    computed: tuple[float, ...] = ()
    reused: list[float] = []
    between: tuple[float, ...] = ()
    history: tuple[Tensor, ...] = ()
    for position, is_computed in plan:
        times = Times(computed, position, tuple(reused), between)
        if is_computed:
            value = torch.tensor(signal(position), dtype=dtype)
            history = compiled.update(history, value, times.ages)
            computed = (position, *computed)[: forecaster.depth]
            between, reused = tuple(reused), []
        else:
            yield position, compiled.predict(history, forecaster.numbers(times)).double().numpy()
            reused.append(position)


def close(found: Iterator[tuple[float, np.ndarray]], expected: Signal, tolerance: float) -> None:
    num_forecasts = 0
    for position, value in found:
        np.testing.assert_allclose(value, expected(position), rtol=tolerance, atol=tolerance, err_msg=str(position))
        num_forecasts += 1
    assert num_forecasts > 5


def wavy(position: float) -> np.ndarray:
    t = position / 10
    return np.array([[[np.sin(t), np.exp(-t / 5), 1 + t, t * t]], [[np.cos(3 * t), 1.0, t, -2 * t**3 / 100]]])


# References, written as recurrences.


class TaylorReference:
    """TaylorSeer with the differences of the previous computed step stored explicitly, as in cache-dit."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.now: list[np.ndarray] = []
        self.at = math.nan

    def update(self, position: float, value: np.ndarray) -> None:
        before, self.now = self.now, [value]
        for i in range(min(self.order, len(before))):
            self.now.append((self.now[i] - before[i]) / (position - self.at))
        self.at = position

    def predict(self, position: float) -> np.ndarray:
        return sum(d * (position - self.at) ** i / math.factorial(i) for i, d in enumerate(self.now))


class FoCaReference:
    """FoCa with two windows, of computed and of all values, as in cache-dit; `plain` ignores gaps, like cache-dit."""

    def __init__(self, plain: bool = False) -> None:
        self.full: list[tuple[float, np.ndarray]] = []
        self.window: list[tuple[float, np.ndarray]] = []
        self.steps, self.plain = 0, plain

    def update(self, position: float, value: np.ndarray) -> None:
        self.full = [(position, value), *self.full[:1]]
        self.window = [(position, value), *self.window[:1]]
        self.steps = 0

    def predict(self, position: float) -> np.ndarray:
        if len(self.full) < 2:
            return self.full[0][1]
        self.steps += 1
        at, value = self.full[0]
        if self.steps > 3:
            self.window[0] = (position, 3 / self.steps * self.third + (1 - 3 / self.steps) * value)
            return self.window[0][1]
        k = self.steps if self.plain else position - at
        found = value + k / 2 * (self._difference(*self.full) + self._difference(*self.window))
        self.third = found
        self.window = [(position, found), self.window[0]]
        return found

    def _difference(self, now: tuple[float, np.ndarray], before: tuple[float, np.ndarray]) -> np.ndarray:
        return (now[1] - before[1]) / (1 if self.plain else now[0] - before[0])


def dmd_reference(values: list[np.ndarray], k: float) -> np.ndarray:
    """The forecast of one sample from values, oldest first, by the plain singular value decomposition."""
    x = np.stack([value.ravel() for value in values], axis=1)
    u, s, vt = np.linalg.svd(x[:, :-1], full_matrices=False)
    rank = max(int((s > 1e-4 * s[0]).sum()), 1)
    inverse = np.diag(1 / (s[:rank] + 1e-8))
    eigenvalues, w = np.linalg.eig(u[:, :rank].T @ x[:, 1:] @ vt[:rank].T @ inverse)
    phi = x[:, 1:] @ vt[:rank].T @ inverse @ w
    b = np.linalg.lstsq(phi, x[:, -1].astype(complex), rcond=None)[0]
    return (phi @ (eigenvalues.astype(complex) ** k * b)).real.reshape(values[0].shape)


def run_reference(reference: TaylorReference | FoCaReference, plan: Plan) -> dict[float, np.ndarray]:
    found = {}
    for position, is_computed in plan:
        if is_computed:
            reference.update(position, wavy(position))
        else:
            found[position] = reference.predict(position)
    return found


# Comparison with the references. Factors are float32, so the errors are a few roundings.


@pytest.mark.parametrize("plan", ["even", "uneven", "timesteps"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_equals_its_recurrence_of_differences(order: int, plan: str):
    expected = run_reference(TaylorReference(order), PLANS[plan])
    close(forecasts(TaylorSeerCalibratorConfig(taylorseer_order=order), PLANS[plan], wavy), expected.get, 2e-5)


@pytest.mark.parametrize("plan", ["even", "uneven", "timesteps"])
def test_foca_equals_its_two_windows_started_at_the_third_newest_value(plan: str):
    steps = PLANS[plan]
    expected = {}
    for i, (position, is_computed) in enumerate(steps):
        if not is_computed:
            oldest = [j for j in range(i) if steps[j][1]][-3]
            # Nothing is forecast between the two oldest of the three, because the values there are not stored.
            first = [(at, known) for at, known in steps[oldest:i] if known][:2]
            window = first + [step for step in steps[oldest:i] if step[0] > first[1][0]]
            expected[position] = run_reference(FoCaReference(), [*window, (position, False)])[position]
    close(forecasts(FoCaCalibratorConfig(), steps, wavy), expected.get, 2e-5)


def test_foca_equals_that_of_cache_dit_for_three_steps_after_only_computed_steps():
    plan: Plan = [(s, s < 7) for s in range(10)]
    expected = run_reference(FoCaReference(plain=True), plan)
    for position, found in forecasts(FoCaCalibratorConfig(), plan, wavy):
        np.testing.assert_allclose(found, expected[position], rtol=2e-5, atol=2e-5)
    # By hand: F = 4, F_prev = 2; then 4 + (2 + 2) / 2, and so on along the line; after three steps it returns to F.
    line = dict(forecasts(FoCaCalibratorConfig(), [(s, s < 3) for s in range(15)], lambda t: np.array([2 * t])))
    assert {at: found.item() for at, found in line.items() if at < 6} == {3: 6, 4: 8, 5: 10}
    assert [line[at].item() for at in (6, 8, 14)] == pytest.approx([4 + 6 * 3 / 4, 4 + 6 * 3 / 6, 4 + 6 * 3 / 12])


def test_dmd_equals_the_decomposition_of_each_sample_or_a_line():
    taylor = run_reference(TaylorReference(1), EVEN)
    known: list[tuple[float, np.ndarray]] = []
    expected = {}
    for position, is_computed in EVEN:
        if is_computed:
            known = [*known, (position, wavy(position))][-6:]
            continue
        gap = known[-1][0] - known[-2][0]
        tail = next(n for n in range(len(known), 1, -1) if np.ptp(np.diff([at for at, _ in known[-n:]])) == 0)
        values, k = [value for _, value in known[-tail:]], (position - known[-1][0]) / gap
        per_sample = [dmd_reference([value[i] for value in values], k) for i in range(2)]
        expected[position] = np.stack(per_sample) if tail >= 4 else taylor[position]
    close(forecasts(DMDCalibratorConfig(), EVEN, wavy), expected.get, 1e-4)


# Functions that are forecast exactly.


def polynomial(*coefficients: float) -> Signal:
    """A polynomial (highest power first) whose scale differs between two samples."""
    return lambda t: np.polyval(coefficients, t / 10) * np.array([[[1.0, -0.5]], [[2.0, 0.25]]])


CONSTANT, LINE, PARABOLA = polynomial(0.7), polynomial(0.8, 0.1), polynomial(-0.6, 0.4, 0.2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("forecaster", [Forecaster(), *BUILT_IN], ids=repr)
def test_every_forecaster_forecasts_a_constant(forecaster: Forecaster, plan: str):
    close(forecasts(forecaster, PLANS[plan], CONSTANT), CONSTANT, 3e-4)


@pytest.mark.parametrize("plan", ["even", "uneven", "timesteps"])
@pytest.mark.parametrize("forecaster", BUILT_IN[:3], ids=repr)
def test_polynomials_forecast_a_line(forecaster: Forecaster, plan: str):
    close(forecasts(forecaster, PLANS[plan], LINE), LINE, 2e-4)


@pytest.mark.parametrize("forecaster", BUILT_IN[1:3], ids=repr)
def test_a_line_is_forecast_if_timesteps_repeat(forecaster: Forecaster):
    close(forecasts(forecaster, TWICE, LINE), LINE, 2e-4)


def test_foca_forecasts_a_line_for_three_steps():
    close(forecasts(FoCaCalibratorConfig(), EVEN, LINE), LINE, 1e-5)


def test_only_the_polynomial_forecasts_a_parabola():
    close(forecasts(PolynomialCalibratorConfig(order=2), UNEVEN, PARABOLA), PARABOLA, 1e-4)
    taylor = TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert max(abs(found - PARABOLA(at)).max() for at, found in forecasts(taylor, UNEVEN, PARABOLA)) > 0.01


def exponentials(t: float) -> np.ndarray:
    """Two decays and a damped wave, mixed with other weights in each sample."""
    mixed = np.random.default_rng(0).normal(size=(2, 8, 4))
    parts = [0.95**t, 0.8**t, 0.9**t * np.cos(0.5 * t), 0.9**t * np.sin(0.5 * t)]
    return mixed @ np.array(parts)


def test_dmd_forecasts_exponentials_beyond_evenly_spaced_steps():
    plan: Plan = [(s, s in range(0, 11, 2)) for s in range(16)]
    late = ((at, found) for at, found in forecasts(DMDCalibratorConfig(), plan, exponentials) if at > 10)
    for at, found in late:
        np.testing.assert_allclose(found, exponentials(at), atol=2e-4)
    # In float32 the values are rounded, which changes the smallest mode.
    values = list(forecasts(DMDCalibratorConfig(), plan, exponentials, torch.float32))
    assert all(abs(found - exponentials(at)).max() < 0.01 for at, found in values if at > 10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.floats(0.01, 5), st.integers(0, 3))
def test_the_polynomial_is_exact_at_any_positions(gaps: list[float], ahead: float, order: int):
    at = np.cumsum(gaps)[::-1][: order + 1].tolist()
    factors = PolynomialCalibratorConfig(order=order).numbers(Times(tuple(at), at[0] + ahead))
    for power in range(len(at)):
        # Factors may cancel; the bound is the sum of their absolute terms times the rounding error.
        bound = 1e-11 * sum(abs(f) * p**power for f, p in zip(factors, at, strict=True)) + 1e-9
        found = sum(f * p**power for f, p in zip(factors, at, strict=True))
        assert abs(found - (at[0] + ahead) ** power) <= bound


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=5, max_size=9), st.integers(1, 3), st.data())
def test_factors_add_up_to_one_at_any_times(gaps: list[float], computed: int, data: st.DataObject):
    at = np.cumsum(gaps).tolist()
    split = data.draw(st.integers(computed, len(at) - 1))
    times = Times(tuple(at[:computed][::-1]), at[-1], tuple(at[split:-1]))
    for forecaster in BUILT_IN[:4]:
        numbers = forecaster.numbers(dataclasses.replace(times, computed=times.computed[: forecaster.depth]))
        assert abs(sum(numbers) - 1) <= 1e-9 * sum(map(abs, numbers))


# Edge cases.


def dmd(values: list[Tensor], numbers: tuple[float, ...], **fields: int) -> Tensor:
    forecaster = DMDCalibratorConfig(dmd_history=len(values), **fields)
    return forecaster.predict(tuple(reversed(values)), torch.tensor(numbers))


def test_dmd_falls_back_to_a_line_if_it_diverges_or_is_not_finite():
    mixed = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0))
    grows = [mixed @ torch.tensor([3.0**t, 1.0]) for t in range(6)]
    torch.testing.assert_close(dmd([v[None] for v in grows], (4.0, 6.0)), (5 * grows[5] - 4 * grows[4])[None])
    broken = [torch.full((2, 1, 2), float(t)) for t in range(5)]
    broken[0][1] = torch.inf
    found = dmd(broken, (1.0, 5.0))
    torch.testing.assert_close(found[1], torch.full((1, 2), 5.0))
    zeros = dmd([torch.zeros(1, 2, 2)] * 4, (2.0, 4.0))
    assert torch.equal(zeros, torch.zeros(1, 2, 2))


def test_dmd_uses_at_most_dmd_rank_modes_and_none_below_the_rounding():
    values = [torch.tensor(exponentials(t)[:1])[None] for t in range(6)]
    one, all_of_them = dmd(values, (1.0, 6.0), dmd_rank=1), dmd(values, (1.0, 6.0))
    assert (one - all_of_them).abs().max() > 0.1
    truth = torch.tensor(0.9**6 * np.arange(1.0, 65).reshape(1, 8, 8))
    decays = [(truth * 0.9 ** (t - 6)).bfloat16() for t in range(6)]
    torch.testing.assert_close(dmd(decays, (1.0, 6.0)), truth.bfloat16(), rtol=0.02, atol=0)


def test_dmd_counts_the_evenly_spaced_values():
    forecaster = DMDCalibratorConfig()
    assert forecaster.numbers(Times((9, 7, 5, 3, 2, 1), 10)) == (0.5, 4.0)
    assert forecaster.numbers(Times((3, 2), 5)) == (2.0, 2.0)
    assert forecaster.numbers(Times((3,), 5)) == (0.0, 1.0)
    assert forecaster.numbers(Times((3, 3, 2), 5)) == (0.0, 1.0)


@pytest.mark.parametrize("forecaster", BUILT_IN, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(forecaster: Forecaster, dtype: torch.dtype):
    values = [torch.tensor(wavy(t / 2)) for t in range(forecaster.depth)]
    numbers = torch.tensor(forecaster.numbers(Times(tuple(range(forecaster.depth))[::-1], forecaster.depth)))
    halves = tuple(value.to(dtype) for value in reversed(values))
    found = forecaster.predict(halves, numbers)
    assert found.dtype == dtype
    if not isinstance(forecaster, DMDCalibratorConfig):  # DMD drops modes below the rounding of the dtype.
        assert torch.equal(found, forecaster.predict(tuple(h.float() for h in halves), numbers).to(dtype))
