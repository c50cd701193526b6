"""A forecast that is no better than the last value is not used: when control or guidance ends, and per sample."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx import CacheConfig, explain
from cachedit_fx.forecasters import FoCaCalibratorConfig, PolynomialCalibratorConfig
from cachedit_fx.forecasters.compile import EagerForecaster
from cachedit_fx.forecasters.verdict import choose, is_gap, is_jump, judge, terms, unproven
from cachedit_fx.runtime.cached_values import CachedValue, Forecast
from tests import tiny
from tests.hybrid import moving
from tests.sessions import every_session
from tests.test_forecast_runtime import STREAMS, assert_close, by_hand, by_line, enabled, far_apart, last, outputs_of

LINE = PolynomialCalibratorConfig(order=1)
SIXTEEN = tuple(1 - step / 20 for step in range(16))
SWITCH = 8  # The step at which control ends.


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def controlled() -> list[dict[str, Tensor]]:
    """Calls whose latents drift slowly and have a signal added to them until step `SWITCH`."""
    control = 2 * tiny.latents(7)
    return [
        call | {"hidden_states": call["hidden_states"] + control * (step < SWITCH)}
        for step, call in enumerate(moving(times=SIXTEEN))
    ]


def run(calls: list[dict[str, Tensor]], **fields: Any) -> tuple[list[Tensor], cachedit_fx.inspect.CacheStats]:
    model = enabled(**fields)
    outputs = outputs_of(model, calls)
    return outputs, every_session(model)[-1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("forecaster", [FoCaCalibratorConfig(), LINE], ids=["foca", "line"])
@pytest.mark.parametrize("is_static", [False, True], ids=["threshold", "mask"])
def test_the_last_value_is_repeated_after_control_ends(forecaster: Any, is_static: bool) -> None:
    mask = [step < 4 or step in (SWITCH, 12) for step in range(16)]
    dynamic = dict(steps_computation_mask=None, residual_diff_threshold=0.3, max_warmup_steps=4)
    fields = dict(steps_computation_mask=[*map(int, mask)]) if is_static else dynamic
    calls = controlled()
    found, stats = run(calls, **fields, forecaster=forecaster)
    repeated, plain = run(calls, **fields)
    truth = outputs_of(tiny.build(), calls)
    assert stats.decisions == plain.decisions and SWITCH not in stats.cached_steps
    after = list(itertools.takewhile(lambda step: step in stats.cached_steps, range(SWITCH + 1, 16)))
    assert (
        len(after) >= 3 and set(after) <= set(stats.not_forecast) and not set(stats.not_forecast) & set(range(SWITCH))
    )
    for step in after:
        torch.testing.assert_close(found[step], repeated[step], rtol=0, atol=0)
    assert max(relative(found[step], truth[step]) for step in after[:3]) < 0.2
    assert far_apart(found, repeated, [SWITCH - 1])
    assert f"{after[0]} " in str(stats.to_dict()["not_forecast"]).replace(",", " ")


def test_a_gap_in_guidance_restarts_the_history_of_a_branch() -> None:
    """Guidance runs in steps 0 to 5 and 12 to 15, which are the steps 0 to 9 of its branch."""
    given = [step for step in range(16) if step < 6 or step > 11]
    mask = (1, 1, 1, 1, 0, 0, 0, 1, 0, 0)
    both = [(moving(seed, SIXTEEN), prompt) for seed, prompt in ((1, tiny.prompt(1)), (2, tiny.prompt(2)))]
    conditional, negative = ([c | {"encoder_hidden_states": p} for c in calls] for calls, p in both)
    model = enabled(forecaster=LINE, steps_computation_mask=mask)
    found = []
    for step in range(16):
        model(**conditional[step])
        if step in given:
            found.append(model(**negative[step])[0])

    def rule(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
        return by_line(values, now) if now < 6 else last(values, now)

    expected = by_hand(tiny.build(), [negative[step] for step in given], dict.fromkeys(STREAMS, rule), mask=mask)
    assert_close(found, expected)
    stats = every_session(model)[-1]
    assert [step for step in stats.not_forecast if step > 3] == [6, 8, 9]
    assert list(every_session(model)[0].not_forecast) == []


def test_a_step_that_raises_does_not_change_the_verdict() -> None:
    calls = controlled()
    expected, _ = run(calls, forecaster=LINE, steps_computation_mask=None, residual_diff_threshold=0.3)
    model = enabled(forecaster=LINE, steps_computation_mask=None, residual_diff_threshold=0.3)
    found = []
    for step, call in enumerate(calls):
        if step == SWITCH:
            tiny.Watch.ran, tiny.Watch.error, tiny.Watch.error_at = 0, RuntimeError("block"), 3
            with pytest.raises(RuntimeError, match="block"):
                model(**call)
            tiny.Watch.error = None
        found.append(model(**call)[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("forecaster", [None, FoCaCalibratorConfig(), FoCaCalibratorConfig(enable_calibrator=False)])
def test_explain_counts_the_state_of_a_forecaster(forecaster: Any) -> None:
    calls, fields = moving(), dict(Fn_compute_blocks=1, max_warmup_steps=4, inner_backend="eager")
    config = CacheConfig(**fields, forecaster=forecaster)
    (graph,) = explain(tiny.build(), cache_config=config, **calls[0]).graphs
    _, stats = run(calls, **fields, steps_computation_mask=None, forecaster=forecaster)
    assert graph.state_bytes == stats.peak_state_bytes


# Verdicts per value.


def cached_values_of(values: list[Tensor], *, is_static: bool = False) -> list[CachedValue]:
    """The cached value of a stream after each of these values, one per step."""
    forecast, found = Forecast(LINE, EagerForecaster(LINE)), [CachedValue()]
    for step, value in enumerate(values):
        found.append(found[-1].with_value(value, float(step), ((), ()), forecast, is_static=is_static))
    return found[1:]


def verdicts(values: list[Tensor], **fields: bool) -> list[list[bool]]:
    return [cached.verdict.tolist() for cached in cached_values_of(values, **fields) if cached.verdict is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sample_repeats_its_last_value_while_its_forecast_is_worse(dtype: torch.dtype) -> None:
    """One sample follows a line; the other alternates between two values and later follows a line too."""
    steady, turning = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 1.0, 2.0, 3.0, 4.0]
    shape = torch.ones(2, 3, 4, dtype=dtype)
    values = [shape * torch.tensor(pair, dtype=dtype).view(2, 1, 1) for pair in zip(steady, turning, strict=True)]
    found = cached_values_of(values)
    expected = [[True, True], [True, True], [True, False], [True, False], [True, True], [True, True]]
    # At 3 the line from 1 to 2 is correct for the first time.
    assert [cached.verdict.tolist() for cached in found if cached.verdict is not None] == [
        *expected[:3], [True, False], [True, True], [True, True]
    ]  # fmt: skip
    forecast = Forecast(LINE, EagerForecaster(LINE))
    value = found[3].at(5.0, ((), ()), forecast, is_outdated=False)
    assert value is not None and value.dtype == dtype
    assert value[:, 0, 0].tolist() == [6.0, 2.0]  # Two steps later: the line, and the last value.
    assert found[3].at(5.0, ((), ()), forecast, is_outdated=True) is values[3]


def test_with_a_static_mask_only_a_jump_counts() -> None:
    turning = [torch.full((1, 2, 3), value) for value in (1.0, 2.0, 1.0, 2.0)]
    assert verdicts(turning)[-2:] == [[False], [False]] and verdicts(turning, is_static=True)[-2:] == [[True], [True]]
    jumping = [torch.full((1, 2, 3), value) for value in (1.0, 1.1, 1.2, 4.0)]
    assert verdicts(jumping, is_static=True) == [[True], [True], [True], [False]]


def test_nan_and_constant_values_are_judged() -> None:
    value, broken = torch.ones(2, 2, 2), torch.ones(2, 2, 2)
    broken[1] = torch.nan
    numbers = torch.tensor(terms(cachedit_fx.forecasters.Times((1.0, 0.0), 2.0), is_static=False))
    found = judge((value, value), broken, value, unproven(value), numbers)
    assert found.tolist() == [True, False]
    assert choose(value, broken, found).equal(value)
    lost = torch.zeros(2, dtype=torch.bool)  # A forecast that equals the last value changes no verdict.
    assert judge((value, value), value, 2 * value, lost, numbers).tolist() == [False, False]
    assert judge((value, value), value, 2 * value, ~lost, numbers).tolist() == [True, True]
    flat = torch.ones(5)
    assert judge((flat,), flat, flat, unproven(flat), numbers).shape == (1,)
    assert choose(flat, 2 * flat, unproven(flat)).equal(2 * flat)


def test_jumps_and_gaps_are_detected() -> None:
    assert is_jump(1.0, (0.1, 0.2, 0.3)) and not is_jump(0.7, (0.1, 0.2, 0.3))
    assert not any(is_jump(1.0, before) for before in ((), (0.1,), (0.0, 0.0), (float("inf"), 0.1), (0.9, 0.01)))
    assert not is_jump(float("nan"), (0.1, 0.1)) and is_jump(1.0, (9.0, 0.1, 0.1, 0.1))
    assert is_gap((1.0, 0.9, 0.8, 0.3)) and is_gap((0, 1, 2, 3, 9))
    assert not is_gap((1.0, 0.9, 0.8, 0.65)) and not is_gap((1.0, 0.9, 0.2)) and not is_gap((None, None, None, None))
    assert not is_gap((1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.7))  # A scheduler that calls the model twice per timestep.
