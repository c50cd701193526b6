"""Forecasters in compiled models, compared with blocks skipped by hand and NumPy on recorded residuals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx import CacheConfig, DBCacheConfig, ParamsModifier, load_configs
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import Forecaster, LinearForecaster, Times
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from tests import hybrid, tiny
from tests.generations import NUM_STEPS, Recorder, backend, settings
from tests.hybrid import moving
from tests.models import FAMILIES, denoise
from tests.reference import ReferenceCache
from tests.sessions import every_session

STREAMS = ("hidden_states", "encoder_hidden_states")
MASK = (1, 1, 0, 0, 1, 0, 1, 0)
STATIC = dict(steps_computation_mask=MASK, steps_computation_policy="static")
# A forecast sums float32 values in another order and passes through the output projection.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@dataclass(frozen=True, kw_only=True)
class Line(LinearForecaster):
    """The line through the last two values."""

    @property
    def depth(self) -> int:
        return 2

    def numbers(self, times: Times) -> Sequence[float]:
        if len(times.computed) < 2:
            return (1.0,)
        slope = times.ages[0] / (times.computed[0] - times.computed[1])
        return (1 + slope, -slope)


@dataclass(frozen=True, kw_only=True)
class Counting(LinearForecaster):
    """The last value times 1 + (steps reused since the newest computed one) + 10 * (reused between the two newest)."""

    def numbers(self, times: Times) -> Sequence[float]:
        return (1.0 + len(times.reused) + 10.0 * len(times.between),)


@dataclass(frozen=True, kw_only=True)
class Average(Forecaster):
    """A running mean in which the newest value has the weight 1/2."""

    def update(self, history: tuple[Tensor, ...], value: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        return ((history[0] + value) / 2,) if history else (value,)


Residuals = dict[str, list[tuple[float, np.ndarray]]]  # Stream -> positions and values of the computed steps.
ForecastRule = Callable[[list[tuple[float, np.ndarray]], float], np.ndarray]


def by_line(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
    if len(values) < 2:
        return values[-1][1]
    (t0, v0), (t1, v1) = values[-2:]
    return v1 + (v1 - v0) / (t1 - t0) * (now - t1)


def by_judged_line(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
    """For each sample the line, unless it was clearly worse than the last value at the newest computed step."""
    used = np.ones(len(values[0][1]), bool)
    for i in range(2, len(values)):
        position, value = values[i]
        missed, moved, before = (
            np.square(one - other).reshape(len(value), -1).sum(1)
            for one, other in (
                (by_line(values[:i], position), value),
                (values[i - 1][1], value),
                (values[i - 1][1], values[i - 2][1]),
            )
        )
        pace = max(1.0, (position - values[i - 1][0]) / (values[i - 1][0] - values[i - 2][0]))
        jumped = (moved > (3 * pace) ** 2 * before) & (missed > 0.8 * moved)
        used = (missed <= 1.5 * moved) & ~jumped
    uses_line = used.reshape(-1, *[1] * (values[-1][1].ndim - 1))
    return np.where(uses_line, by_line(values, now), values[-1][1])


def last(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
    return values[-1][1]


def by_hand(
    model: tiny.Transformer,
    calls: list[dict[str, Tensor]],
    forecast: dict[str, ForecastRule],
    *,
    mask: Sequence[int] = MASK,
    position: Callable[[int, dict[str, Tensor]], float] = lambda step, call: float(step),
) -> list[Tensor]:
    """The outputs of a generation. Where the mask is 0, all blocks but the first are replaced by a forecast."""
    residuals: Residuals = {name: [] for name in STREAMS}
    outputs = []
    for step, call in enumerate(calls):
        now = position(step, call)
        scale = (1 + call["timestep"])[:, None, None]
        streams = (model.proj_in(call["hidden_states"]), model.proj_text(call["encoder_hidden_states"]))
        cut = streams = model.blocks[0](*streams, scale)
        if mask[step]:
            for block in list(model.blocks)[1:]:
                streams = block(*streams, scale)
            for name, after, before in zip(STREAMS, streams, cut, strict=True):
                residuals[name].append((now, (after - before).numpy()))
        else:
            added = [torch.from_numpy(forecast[name](residuals[name], now)).float() for name in STREAMS]
            streams = tuple(stream + value for stream, value in zip(streams, added, strict=True))
        hidden, encoder = streams
        outputs.append(model.proj_out(hidden + encoder.mean(1, keepdim=True)))
    return outputs


def enabled(model: Any = None, **fields: Any) -> Any:
    base = dict(Fn_compute_blocks=1, max_warmup_steps=1, forecaster=None, inner_backend="eager") | STATIC
    return cachedit_fx.enable_cache(model if model is not None else tiny.build(), CacheConfig(**base | fields))


def outputs_of(model: Any, calls: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**call)[0] for call in calls]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, **CLOSE, msg=lambda text, i=step: f"step {i}: {text}")


def far_apart(found: Sequence[Tensor], other: Sequence[Tensor], steps: Sequence[int]) -> bool:
    return all((found[step] - other[step]).abs().max() > 1e-3 for step in steps)


@pytest.mark.parametrize("order", [1, 2])
def test_reused_steps_add_the_forecast_that_numpy_computes(order: int) -> None:
    forecaster = Line() if order == 1 else {"type": "taylorseer", "taylorseer_order": order}
    found = outputs_of(enabled(forecaster=forecaster), moving())
    rule = by_line if order == 1 else by_taylor
    expected = by_hand(tiny.build(), moving(), dict.fromkeys(STREAMS, rule))
    assert_close(found, expected)
    plain = outputs_of(enabled(), moving())
    assert far_apart(found, plain, [2, 3, 5, 7])
    torch.testing.assert_close(found[:2], plain[:2], rtol=0, atol=0)


def by_taylor(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
    """The Taylor sum of order 2 with differences of differences, each divided by the gap before its step."""
    levels: list[list[np.ndarray]] = []
    for i, (position, value) in enumerate(values):
        level = [value]
        for k in range(min(2, i)):
            if k < len(levels[-1]):
                level.append((level[k] - levels[-1][k]) / (position - values[i - 1][0]))
        levels.append(level)
    age = now - values[-1][0]
    return sum(part * age**k / (1, 1, 2)[k] for k, part in enumerate(levels[-1]))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("switch", "covered"),
    [("enable_calibrator", "encoder_hidden_states"), ("enable_encoder_calibrator", "hidden_states")],
)
def test_a_stream_that_is_switched_off_repeats_its_last_value(switch: str, covered: str) -> None:
    found = outputs_of(enabled(forecaster=Line(**{switch: False})), moving())
    rules = {name: by_line if name == covered else last for name in STREAMS}
    assert_close(found, by_hand(tiny.build(), moving(), rules))
    assert far_apart(found, outputs_of(enabled(forecaster=Line()), moving()), [3])


def test_positions_may_be_timesteps() -> None:
    times = (1.0, 0.95, 0.8, 0.6, 0.55, 0.3, 0.2, 0.1)
    calls = moving(times=times)
    found = outputs_of(enabled(forecaster=Line(by="timestep")), calls)
    moved = dict(position=lambda _, call: 1.0 - call["timestep"][0].item())
    assert_close(found, by_hand(tiny.build(), calls, dict.fromkeys(STREAMS, by_line), **moved))
    assert far_apart(found, outputs_of(enabled(forecaster=Line()), calls), [2, 3, 5])


def test_without_a_timestep_positions_are_step_numbers() -> None:
    class Timeless(tiny.Transformer):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
            return super().forward(hidden_states, encoder_hidden_states, hidden_states[:, 0, 0].tanh())

    def run(by: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = enabled(tiny.frozen(Timeless()), forecaster=Line(by=by))
        calls = [{k: v for k, v in call.items() if k != "timestep"} for call in moving()]
        with cachedit_fx.session("one"):
            found = outputs_of(model, calls)
        assert every_session(model)[-1].cached_steps == [2, 3, 5, 7]
        return found

    torch.testing.assert_close(run("timestep"), run("step"), rtol=0, atol=0)


def test_a_forecaster_receives_the_steps_that_were_reused() -> None:
    calls, counts = moving(), {2: 1, 3: 2, 5: 21, 7: 11}
    found = outputs_of(enabled(forecaster=Counting()), calls)
    expected = by_hand(
        tiny.build(), calls, dict.fromkeys(STREAMS, lambda values, now: values[-1][1] * np.float32(counts[int(now)]))
    )
    assert_close(found, expected)


def test_a_forecaster_may_store_an_average_instead_of_values() -> None:
    def average(values: list[tuple[float, np.ndarray]], now: float) -> np.ndarray:
        mean = values[0][1]
        for _, value in values[1:]:
            mean = (mean + value) / 2
        return mean

    found = outputs_of(enabled(forecaster=Average()), moving())
    assert_close(found, by_hand(tiny.build(), moving(), dict.fromkeys(STREAMS, average)))


def test_the_base_class_is_bitwise_equal_to_no_forecaster() -> None:
    found = outputs_of(enabled(forecaster=Forecaster()), moving())
    torch.testing.assert_close(found, outputs_of(enabled(), moving()), rtol=0, atol=0)


# State.


def test_interleaved_sessions_do_not_mix() -> None:
    model = enabled(forecaster=Line())
    alone = [outputs_of(enabled(forecaster=Line()), moving(seed)) for seed in (1, 2)]
    mixed: list[list[Tensor]] = [[], []]
    for pair in zip(moving(1), moving(2), strict=True):
        for key, call in enumerate(pair):
            with cachedit_fx.session(key):
                mixed[key].append(model(**call)[0])
    torch.testing.assert_close(mixed, alone, rtol=0, atol=0)


def test_a_new_generation_and_another_size_start_with_an_empty_history() -> None:
    model = enabled(forecaster=Line())
    first = outputs_of(model, moving())
    torch.testing.assert_close(outputs_of(model, moving()), first, rtol=0, atol=0)
    text = tiny.prompt()
    calls = [call | {"encoder_hidden_states": text} for call in moving()]
    small = [call | {"hidden_states": call["hidden_states"][:, :4]} for call in calls]
    mask = dict(steps_computation_mask=(1, 1, 1, 0, 1, 0, 1, 0))
    model = enabled(forecaster=Line(), **mask)
    found = outputs_of(model, [*calls[:2], *small[2:]])
    expected = by_hand(
        tiny.build(), small[2:], dict.fromkeys(STREAMS, by_line), mask=mask["steps_computation_mask"][2:]
    )
    assert_close(found[2:], expected)


def test_a_forced_refresh_clears_the_history() -> None:
    found = outputs_of(enabled(forecaster=Line(), force_refresh_step_hint=4), moving())
    masks = (*MASK[:4], *MASK[:4])
    before = by_hand(tiny.build(), moving()[:4], dict.fromkeys(STREAMS, by_line))
    after = by_hand(tiny.build(), moving()[4:], dict.fromkeys(STREAMS, by_line), mask=masks[4:])
    assert_close(found, [*before, *after])


def test_the_state_bytes_include_the_history() -> None:
    one = tiny.STREAM_BYTES + tiny.TEXT_BYTES
    for forecaster, count in ((None, 1), (Line(), 2), ({"type": "taylorseer", "taylorseer_order": 2}, 3)):
        model = enabled(forecaster=forecaster)
        outputs_of(model, moving())
        (stats,) = every_session(model)
        # The probe is stored once.
        verdicts = 0 if forecaster is None else 2 * tiny.BATCH
        assert stats.peak_state_bytes == count * one + tiny.STREAM_BYTES + verdicts


def test_another_forecaster_recompiles_no_graph() -> None:
    model = enabled()
    plain = outputs_of(model, moving())
    with torch._dynamo.config.patch(error_on_recompile=True):
        cachedit_fx.refresh_context(model, forecaster=Line())
        assert far_apart(outputs_of(model, moving()), plain, [2, 3, 5])
        cachedit_fx.refresh_context(model, forecaster=None)
        torch.testing.assert_close(outputs_of(model, moving()), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(dict(forecaster=Line()), id="line"),
        pytest.param(dict(forecaster=Average()), id="average"),
        pytest.param(dict(steps_computation_mask=None, residual_diff_threshold=0.3), id="what-is-looked-at"),
    ],
)
def test_a_copy_is_cached_if_buffers_are_overwritten(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    expected = outputs_of(enabled(**fields, compile_blocks="inline"), moving())

    def with_buffers(_: InnerCompiler, gm: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        """Returns the same tensors at every call, as CUDA graphs do."""
        buffers: list[Tensor] = []

        def run(*args: Tensor) -> tuple[Tensor, ...]:
            found = gm(*args)
            buffers[:] = buffers or [tensor.clone() for tensor in found]
            return tuple(
                new if any(new is arg for arg in args) else buffer.copy_(new)
                for buffer, new in zip(buffers, found, strict=True)
            )

        return run

    start = InnerCompiler.__init__

    def owning(self: InnerCompiler, *args: Any) -> None:
        start(self, *args)
        self.owns_buffers = True

    monkeypatch.setattr(InnerCompiler, "__init__", owning)
    monkeypatch.setattr(InnerCompiler, "__call__", with_buffers)
    torch._dynamo.reset()  # Otherwise the graphs from above are used.
    model = enabled(**fields, compile_blocks="inline")
    found = [model(**call)[0].clone() for call in moving()]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Shadow, lists, guidance.


def test_shadow_measures_the_error_of_the_forecast() -> None:
    model = enabled(forecaster=Line(), shadow=True)
    computed = outputs_of(model, moving())
    torch.testing.assert_close(computed, outputs_of(tiny.build(), moving()), rtol=0, atol=0)
    (stats,) = every_session(model)
    reused = by_hand(tiny.build(), moving(), dict.fromkeys(STREAMS, by_line))
    for step in stats.cached_steps:
        apart = torch.linalg.vector_norm(reused[step] - computed[step]) / torch.linalg.vector_norm(computed[step])
        assert stats.errors[step].reused
        # The error is a small difference of float32 values.
        assert stats.errors[step].output == pytest.approx(apart.item(), rel=1e-3, abs=1e-6)
    # Step 4 is computed. The error of reusing it follows from the computed steps before it.
    counterfactual = by_hand(tiny.build(), moving()[:5], dict.fromkeys(STREAMS, by_line), mask=(1, 1, 0, 0, 0))[4]
    apart = torch.linalg.vector_norm(counterfactual - computed[4]) / torch.linalg.vector_norm(computed[4])
    assert not stats.errors[4].reused and stats.errors[4].output == pytest.approx(apart.item(), rel=1e-3, abs=1e-6)


def test_each_list_may_have_a_separate_forecaster() -> None:
    base = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, inner_backend="eager", **STATIC)
    found = []
    for first, second in ((Line(), None), (None, Line()), (Line(), Line())):
        modifiers = [ParamsModifier(calibrator_config=first), ParamsModifier(forecaster=second)]
        model = cachedit_fx.enable_cache(hybrid.build(), base, params_modifiers=modifiers)
        found.append(outputs_of(model, moving()))
    assert all(far_apart(one, found[2], [2, 3]) for one in found[:2]) and far_apart(found[0], found[1], [2, 3])
    whole = cachedit_fx.enable_cache(hybrid.build(), base.override(regions="per_list"), Line())
    torch.testing.assert_close(outputs_of(whole, moving()), found[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_real_transformers_and_guidance_branches_follow_the_reference(name: str) -> None:
    def line(history: list[tuple[int, Tensor]], step: int) -> Tensor:
        found = by_judged_line([(float(at), value.numpy()) for at, value in history], float(step))
        return torch.from_numpy(np.asarray(found, np.float32))

    family = FAMILIES[name]
    fields, references = settings(family), []
    for rule in (dict(forecast=line), {}):
        model = family.build()
        with ReferenceCache(model, family.chain(model), **fields, **rule) as reference:
            denoise(reference, family, family.prompt(1), family.latents(1), NUM_STEPS)
        references.append(reference)
    model = family.build()
    recorder = Recorder(torch.compile(model, backend=backend(**fields | {"forecaster": "taylorseer"}), fullgraph=True))
    denoise(recorder, family, family.prompt(1), family.latents(1), NUM_STEPS)
    for guidance_branch, stats in zip(family.guidance_branches, every_session(model), strict=True):
        assert stats.cached_steps == [r.step for r in references[0].of(guidance_branch) if r.reused]
        assert stats.cached_steps and len(stats.cached_steps) < NUM_STEPS - 3
    assert_close(recorder.outputs, [record.output for record in references[0].records])
    assert not torch.allclose(recorder.outputs[-1], references[1].records[-1].output, **CLOSE)


# Ways to pass a forecaster.


def test_a_calibrator_is_the_forecaster_by_another_name() -> None:
    given = {"type": "taylorseer", "taylorseer_order": 2}
    config = CacheConfig(forecaster=given)
    assert dataclasses.is_dataclass(config.forecaster) and config.forecaster == CacheConfig(forecaster=given).forecaster
    assert hash(config) == hash(CacheConfig(forecaster=given))
    assert ParamsModifier(calibrator_config=config.forecaster).cache_config.forecaster == config.forecaster
    for content in (
        {"cache_config": {"max_warmup_steps": 4}, "calibrator_config": given},
        {"max_warmup_steps": 4, "forecaster": given},
        {"max_warmup_steps": 4, "calibrator_config": given},
    ):
        assert load_configs(content) == {"cache_config": DBCacheConfig(max_warmup_steps=4, forecaster=given)}


def test_a_configuration_for_a_file_names_its_forecaster() -> None:
    given = {"type": "taylorseer", "taylorseer_order": 2}
    config = CacheConfig(forecaster=given, decider=_Never(), max_warmup_steps=4)
    assert json.loads(json.dumps(config.plain_changes)) == [["forecaster", given], ["max_warmup_steps", 4]]


class _Never:
    def decide(self, step: Any) -> bool | None:
        return None


@pytest.mark.parametrize(
    "use",
    [
        lambda: cachedit_fx.enable_cache(tiny.build(), CacheConfig(forecaster=Line()), Line()),
        lambda: cachedit_fx.enable_cache(tiny.build(), calibrator_config=Line(), forecaster=None),
        lambda: ParamsModifier(calibrator_config=Line(), forecaster=Line()),
        lambda: load_configs({"forecaster": "taylorseer", "calibrator_config": "taylorseer"}),
    ],
)
def test_giving_a_forecaster_twice_raises_an_error(use: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="calibrator_config and forecaster set the same field, got both"):
        use()
