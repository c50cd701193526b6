"""Forecasters with an inner compiler, in files, and in docs/forecasters.md."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import (
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    Forecaster,
    LinearForecaster,
    PolynomialCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
    as_mapping,
    forecaster_from,
    forecasters,
    register_forecaster,
    unregister_forecaster,
)
from cachedit_fx.forecasters.compile import CompiledForecaster, EagerForecaster

PAGE = (Path(__file__).parent.parent / "docs" / "forecasters.md").read_text(encoding="utf-8")
BUILT_IN = (
    TaylorSeerCalibratorConfig(taylorseer_order=2),
    PolynomialCalibratorConfig(),
    FoCaCalibratorConfig(),
    DMDCalibratorConfig(),
)


def eager(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
    return graph.forward


@dataclass(frozen=True, kw_only=True)
class MovingAverage(Forecaster):
    """A custom forecaster: an exponential moving average with its own `update`."""

    decay: float = 0.5
    asks: bool = False
    returns: str = ""

    def update(self, history: tuple[Tensor, ...], value: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        if not history:
            return (value,)
        weight = self.decay ** numbers[0]
        return (weight * history[0] + (1 - weight) * value,)

    def predict(self, history: tuple[Tensor, ...], numbers: Tensor) -> Tensor:
        if self.asks and numbers[0] > 1:
            return history[0] * 2
        return {"alias": history[0].view(-1).view_as(history[0]), "": history[0] * 1}[self.returns]


class Counting:
    """An inner compiler that runs graphs unchanged and records them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs.append(graph)
        return graph.forward


def test_a_custom_forecaster_may_update_its_history_itself():
    inner = Counting()
    compiled = CompiledForecaster(MovingAverage(decay=0.25), inner)
    first, second = torch.tensor([[4.0]]), torch.tensor([[8.0]])
    history = compiled.update((), first, ())
    history = compiled.update(history, second, (2.0,))
    assert history[0].item() == 4 / 16 + 8 * 15 / 16
    assert compiled.predict(history, (1.0,)).item() == history[0].item()
    assert len(inner.graphs) == 3


def test_nothing_is_compiled_if_the_forecast_is_the_last_value():
    inner, value = Counting(), torch.ones(1, 2)
    for forecaster in (Forecaster(), TaylorSeerCalibratorConfig(), DMDCalibratorConfig()):
        compiled = CompiledForecaster(forecaster, inner)
        history = compiled.update((), value, ())
        assert compiled.predict(history, forecaster.numbers(Times((0,), 1))) is value
        assert len(compiled.update(history, value, (1.0,))) == min(2, forecaster.depth)
    assert not inner.graphs


def test_pieces_are_compiled_once_per_layout_and_hold_no_tensor():
    inner = Counting()
    compiled = CompiledForecaster(TaylorSeerCalibratorConfig(), inner)
    value = torch.ones(4, 4)
    for factor in (2.0, 3.0):
        assert compiled.predict((value, value), (factor, 1 - factor)).equal(value)
    assert len(inner.graphs) == 1
    compiled.predict((value.T, value.T), (2.0, -1.0))  # The transpose may have the same strides.
    for other in (value[:, :2], value[:2], value.double(), torch.ones(4, 8)[:, ::2]):
        compiled.predict((other, other), (2.0, -1.0))
    assert len(inner.graphs) == 6 - (value.T.stride() == value.stride())
    for graph in inner.graphs:
        assert not list(graph.buffers()) and not list(graph.parameters()) and not graph._modules
        assert not any(isinstance(attribute, Tensor) for attribute in vars(graph).values())


def test_a_forecast_shares_no_memory_with_the_history():
    history = (torch.ones(2, 2),)
    found = CompiledForecaster(MovingAverage(returns="alias"), eager).predict(history, (1.0,))
    assert found.equal(history[0]) and found.data_ptr() != history[0].data_ptr()


@pytest.mark.parametrize("forecaster", BUILT_IN, ids=repr)
def test_with_an_eager_backend_results_equal_those_of_the_functions(forecaster: Forecaster):
    torch.manual_seed(0)
    history = tuple(torch.randn(2, 3, 4) for _ in range(forecaster.depth))
    numbers = forecaster.numbers(Times(tuple(range(forecaster.depth))[::-1], forecaster.depth + 1))
    expected = forecaster.predict(history, torch.tensor(numbers, dtype=torch.float32))
    compiled = CompiledForecaster(forecaster, eager)
    assert torch.equal(compiled.predict(history, numbers), expected)
    with torch.inference_mode():
        inside = tuple(value.clone() for value in history)
        assert torch.equal(CompiledForecaster(forecaster, eager).predict(inside, numbers), expected)
        assert torch.equal(compiled.predict(inside, numbers), expected)


@pytest.mark.slow
def test_tracing_a_forecaster_changes_no_state_that_other_threads_use():
    """Otherwise the guards of their calls would fail meanwhile and Dynamo would recompile."""
    found: list[tuple[object, object, bool]] = []

    class Spying(Forecaster):
        def predict(self, history: tuple[Tensor, ...], numbers: Tensor) -> Tensor:
            found.append((nn.Module.__call__, nn.Module.__getattr__, torch.fx._symbolic_trace.is_fx_tracing()))
            return history[0] + numbers[0] * history[1]

    before = (nn.Module.__call__, nn.Module.__getattr__, False)
    compiled = CompiledForecaster(Spying(), lambda graph, _inputs: graph)
    history = (torch.ones(2, 3), torch.full((2, 3), 4.0))
    assert torch.equal(compiled.predict(history, (0.5,)), torch.full((2, 3), 3.0))
    assert found == [before]


def test_inductor_compiles_sums_and_the_operator_of_dmd():
    from torch._inductor.compile_fx import compile_fx

    history = tuple(torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0)))
    forecaster = DMDCalibratorConfig(dmd_history=4, dmd_rank=2)
    numbers = forecaster.numbers(Times((3, 2, 1, 0), 5))
    found = CompiledForecaster(forecaster, compile_fx).predict(history, numbers)
    expected = forecaster.predict(history, torch.tensor(numbers))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Fused kernels sum in another order.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_compiles_the_functions_that_judge_and_choose(dtype: torch.dtype):
    from torch._inductor.compile_fx import compile_fx

    forecaster, noise = FoCaCalibratorConfig(), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    turns = torch.tensor([0.0, 1.0]).view(2, 1, 1)  # One sample follows a line, the other alternates.
    values = [(noise * (1 + step * (1 - turns) + turns * (step % 2))).to(dtype) for step in range(4)]
    history, value = tuple(reversed(values[:3])), values[3]
    times, verdict = Times((2.0, 1.0, 0.0), 3.0), torch.ones(2, dtype=torch.bool)
    for compiled in (CompiledForecaster(forecaster, compile_fx), EagerForecaster(forecaster)):
        found = compiled.judge(history, value, verdict, times, forecaster.numbers(times), is_static=False)
        assert found.tolist() == [True, False]
        chosen = compiled.predict(history, forecaster.numbers(times), found)
        assert chosen.dtype == dtype and chosen[1].equal(history[0][1])
        torch.testing.assert_close(chosen[0], value[0], rtol=0.02, atol=0.02)


# Names and fields.


@pytest.mark.parametrize("name", [name for name in forecasters() if name != "fitted"])  # It takes only steps.
def test_a_forecaster_can_be_written_and_read_back(name: str):
    forecaster = forecasters()[name](by="timestep", enable_encoder_calibrator=False)
    written = json.loads(json.dumps(as_mapping(forecaster)))
    assert written == {"type": name, "by": "timestep", "enable_encoder_calibrator": False}
    assert forecaster_from(written) == forecaster
    assert forecaster_from(name) == forecasters()[name]() != forecaster
    assert forecaster_from(forecaster) is forecaster


def test_no_forecaster_is_written_as_none():
    assert forecaster_from(None) is None and as_mapping(None) is None


def test_a_custom_class_can_be_registered_under_a_name():
    @register_forecaster("average")
    @dataclass(frozen=True, kw_only=True)
    class Average(LinearForecaster):
        last: int
        weights: tuple[float, ...] = dataclasses.field(default_factory=tuple)

    try:
        assert list(forecasters())[-1] == "average"
        given = forecaster_from({"type": "average", "last": 3})
        assert given == Average(last=3) and as_mapping(given) == {"type": "average", "last": 3}
        with pytest.raises(ConfigError, match="'average' needs a value for last"):
            forecaster_from("average")
    finally:
        unregister_forecaster("average")
    with pytest.raises(ConfigError, match="must have a name"):
        as_mapping(given)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (Forecaster, dict(by="steps"), "by must be one of 'step', 'timestep', got 'steps'. Did you mean 'step'?"),
        (Forecaster, dict(enable_calibrator=1), "enable_calibrator must be True or False, got 1"),
        (TaylorSeerCalibratorConfig, dict(taylorseer_order=1.5), "taylorseer_order must be an int >= 0, got 1.5"),
        (TaylorSeerCalibratorConfig, dict(order=1), "'order' of forecaster TaylorSeerCalibratorConfig is unknown."),
        (DMDCalibratorConfig, dict(dmd_history=3), "dmd_history must be an int >= 4, got 3"),
        (DMDCalibratorConfig, dict(dmd_rank=True), "dmd_rank must be an int >= 0, got True"),
        (DMDCalibratorConfig, dict(dmd_ridge=-1), "dmd_ridge must be a finite number >= 0, got -1"),
        (DMDCalibratorConfig, dict(dmd_svd_precision="hi"), "must be one of 'low', 'medium', 'high', got 'hi'"),
        (PolynomialCalibratorConfig, dict(order=-1), "order must be an int >= 0, got -1"),
        (FoCaCalibratorConfig, dict(calibrator_cache_type="hidden_states"), "must be 'residual' (a reused step adds"),
    ],
)
def test_an_invalid_field_raises_an_error(kind: type[Forecaster], fields: dict[str, object], says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        kind(**fields)


def test_forecasters_compare_by_value():
    one, other = TaylorSeerCalibratorConfig(taylorseer_order=2), TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert one == other and hash(one) == hash(other) and one != PolynomialCalibratorConfig()
    assert dataclasses.replace(one, by="timestep").by == "timestep"


# The page.


def test_the_page_runs_and_names_every_forecaster():
    names: dict[str, object] = {}
    try:
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(code, "docs/forecasters.md", "exec"), names)
    finally:
        unregister_forecaster("average")
    for name, kind in forecasters().items():
        assert f"`{name}`" in PAGE and kind.__name__ in PAGE
        for field in dataclasses.fields(kind):
            assert f"`{field.name}" in PAGE
