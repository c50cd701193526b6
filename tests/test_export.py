"""Exported models decide as compiled ones do, return the same outputs, and refuse what a graph cannot contain."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError, NoMatchError
from cachedit_fx.exporting import ExportedModel
from cachedit_fx.exporting.refuse_config import check_exportable
from cachedit_fx.exporting.tensor_factors import numbers_in_tensors
from cachedit_fx.exporting.tensor_policy import TensorHistory, decide_in_tensors
from cachedit_fx.exporting.tensor_step import separated
from cachedit_fx.forecasters import (
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    Forecaster,
    PolynomialCalibratorConfig,
    TaylorSeerCalibratorConfig,
    Times,
)
from cachedit_fx.policies import Budget, History, Magnitude, decide
from tests import tiny
from tests.sessions import every_session

ROOT = Path(__file__).parent.parent

# The step from 0.5 to 0.2 is a gap; the residual diff jumps there.
TIMES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55, 0.5, 0.2, 0.18, 0.15, 0.1, 0.05)

# A forecast from the first three values is worse than the last of them.
STALLING_TIMES = (1.0, 0.9, 0.8, 0.79, 0.78, 0.77, 0.76, 0.75, 0.65, 0.55, 0.45)


def arguments(timestep: float = 1.0, *, length: int = tiny.TEXT) -> dict[str, Tensor]:
    times = torch.full((tiny.BATCH,), timestep)
    return dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(length=length), timestep=times)


def export(model: nn.Module | None = None, **fields: Any) -> ExportedModel:
    return cachedit_fx.export(model or tiny.build(), arguments(), tiny.config(**fields))


def generate(exported: ExportedModel, times: tuple[float, ...] = TIMES) -> tuple[list[Tensor], list[list[int]]]:
    """The outputs of a generation, and for each region the steps that were reused."""
    state, outputs, computed = exported.initial_state(), [], []
    for timestep in times:
        step = exported(exported.arguments(**arguments(timestep)), state)
        state = step.state
        outputs.append(step.outputs[0])
        computed.append(step.computed.tolist())
    reused = [[i for i, ran in enumerate(of_region) if not ran] for of_region in zip(*computed, strict=True)]
    return outputs, reused


def compiled_generation(model: nn.Module, times: tuple[float, ...] = TIMES, **fields: Any) -> tuple[Any, Any]:
    outputs = tiny.generate(tiny.compiled(model, **fields), tiny.prompt(), tiny.latents(), times)
    return outputs, [list(stats.cached_steps) for stats in every_session(model)]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module that would be traced takes the place of the program, which is much faster."""
    monkeypatch.setattr(
        torch.export, "export", lambda module, *_, **__: SimpleNamespace(module=lambda: module)
    )  # fmt: skip
    yield


CONFIGS: dict[str, dict[str, Any]] = {
    "foca": dict(forecaster=FoCaCalibratorConfig(), residual_diff_threshold=0.15),
    "taylorseer": dict(forecaster=TaylorSeerCalibratorConfig(taylorseer_order=2), residual_diff_threshold=0.1),
    "hidden-only": dict(forecaster=PolynomialCalibratorConfig(enable_encoder_calibrator=False)),
    "tail-blocks": dict(Bn_compute_blocks=1, max_continuous_cached_steps=1, residual_diff_threshold=0.2),
    "limits": dict(max_cached_steps=3, max_warmup_steps=4, warmup_interval=2, residual_diff_threshold=1.0),
    "budget": dict(decision_rule="budget", rescale_coefficients=(1.2, 0.01), residual_diff_threshold=0.15),
    "static-mask": dict(
        steps_computation_mask=(1, 0, 0, 1, 0, 1),
        steps_computation_policy="static",
        forecaster=FoCaCalibratorConfig(),
        Fn_compute_blocks=0,
        probe="none",
    ),
    "output": dict(reach="output", forecaster=TaylorSeerCalibratorConfig(), residual_diff_threshold=0.15),
    "pruning": dict(cache_type="DBPrune", residual_diff_threshold=0.05),
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.usefixtures("untraced")
def test_the_steps_and_outputs_are_those_of_the_compiled_model(fields: dict[str, Any]):
    model = tiny.build()
    expected, reused = compiled_generation(model, **fields)
    outputs, found = generate(export(model, **fields))
    assert found == reused and any(reused)
    tiny.assert_bitwise(outputs, expected)


@pytest.mark.usefixtures("untraced")
def test_a_forecast_that_was_worse_than_the_last_value_is_not_used():
    model, fields = (
        tiny.build(),
        dict(forecaster=FoCaCalibratorConfig(), max_warmup_steps=3, residual_diff_threshold=1.0),
    )
    fields |= dict(max_continuous_cached_steps=1)
    expected, reused = compiled_generation(model, STALLING_TIMES, **fields)
    outputs, found = generate(export(model, **fields), STALLING_TIMES)
    assert found == reused
    (stats,) = every_session(model)
    assert 0 < len(stats.not_forecast) < len(stats.cached_steps)
    tiny.assert_bitwise(outputs, expected)


def test_a_traced_program_has_the_steps_and_outputs_of_the_compiled_model(tmp_path: Path):
    model, fields = tiny.build(), CONFIGS["foca"]
    expected, reused = compiled_generation(model, **fields)
    exported = export(model, **fields)
    outputs, found = generate(exported)
    assert found == reused
    tiny.assert_bitwise(outputs, expected)
    # Both branches are in the graph, and its weights have the names that the model gave them.
    assert "torch.ops.higher_order.cond" in str(exported.program.graph_module.code)
    weights = {name.removeprefix("weights.") for name in exported.program.state_dict}
    assert weights == {*model.state_dict()}
    exported.save(tmp_path / "model.pt2")
    files = {"cachedit_fx": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=files)
    names = [entry["name"] for entry in json.loads(files["cachedit_fx"])["state"]]
    assert names == [spec.name for spec in exported.state]


@pytest.mark.usefixtures("untraced")
def test_the_threshold_is_an_input():
    exported = export(residual_diff_threshold=0.08)
    inputs, state = exported.arguments(**arguments(1.0)), exported.initial_state()
    state = exported(inputs, state).state
    inputs = exported.arguments(**arguments(0.97))
    found = [bool(exported(inputs, state, exported.threshold(value)).computed) for value in (0.0, 0.01, 0.08, 1.0)]
    assert found == [True, True, False, False]


@pytest.mark.usefixtures("untraced")
def test_the_initial_state_begins_a_generation():
    exported = export()
    first, reused = generate(exported)
    again, reused_again = generate(exported)
    assert reused == reused_again
    tiny.assert_bitwise(again, first)


@pytest.mark.usefixtures("untraced")
def test_inputs_may_be_positional_and_have_the_order_of_the_signature():
    exported = cachedit_fx.export(tiny.build(), tuple(arguments().values()), tiny.config())
    assert [spec.name for spec in exported.inputs] == [*arguments()]
    inputs = exported.arguments(*arguments().values())
    assert all(x is y or torch.equal(x, y) for x, y in zip(inputs, arguments().values(), strict=True))


@pytest.mark.usefixtures("untraced")
def test_an_exported_model_has_one_size():
    exported = export()
    with pytest.raises(ConfigError, match=r"encoder_hidden_states must be a float32 tensor of shape \(2, 5, 3\)"):
        exported.arguments(**arguments(length=6))


@pytest.mark.usefixtures("untraced")
def test_the_settings_of_an_enabled_model_are_used():
    model = tiny.build()
    cachedit_fx.enable_cache(model, tiny.config(Bn_compute_blocks=1))
    assert cachedit_fx.export(model, arguments()).regions == ("blocks[1:3]",)


def test_operands_of_a_conditional_share_no_memory():
    whole = torch.arange(4.0)
    found = separated([whole, whole[:2], whole[2:], torch.ones(1)])
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 4
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2, 3], [0, 1], [2, 3], [1]]


FORECASTERS: list[Forecaster] = [
    FoCaCalibratorConfig(),
    *(TaylorSeerCalibratorConfig(taylorseer_order=order) for order in range(4)),
    *(PolynomialCalibratorConfig(order=order) for order in range(4)),
]


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=str)
def test_the_numbers_of_a_forecast_are_those_of_the_forecaster(forecaster: Forecaster):
    rng = random.Random(0)
    for _ in range(60):
        count = rng.randint(1, forecaster.depth)
        *oldest_first, now = itertools.accumulate((rng.randint(1, 7) for _ in range(count + 1)), initial=-1)
        computed = [float(step) for step in oldest_first[:0:-1]]
        reused = tuple(map(float, range(int(computed[0]) + 1, now)))
        between = tuple(map(float, range(int(computed[1]) + 1, int(computed[0])))) if count > 1 else ()
        expected = forecaster.numbers(Times(tuple(computed), float(now), reused, between))
        positions = torch.tensor(computed, dtype=torch.float64)
        found = numbers_in_tensors(forecaster, positions, torch.tensor(now, dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)


POLICIES: list[dict[str, Any]] = [
    dict(max_warmup_steps=2, max_continuous_cached_steps=2, max_cached_steps=4),
    dict(max_warmup_steps=5, warmup_interval=2, max_accumulated_residual_diff_threshold=0.2),
    dict(steps_computation_mask=(1, 1, 0, 1, 0, 0, 1)),
    dict(steps_computation_mask=(1, 0, 1, 0), steps_computation_policy="static"),
    dict(policy=Budget(coefficients=(3.0, -0.5, 0.02))),
]


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_every_decision_is_that_of_the_policy(fields: dict[str, Any]):
    rng = random.Random(0)
    for _ in range(80):
        config = CacheConfig(residual_diff_threshold=rng.choice((-1.0, 0.0, 0.1, 0.3, 1.0)), **fields)
        counts, accumulated = [rng.randint(0, 8) for _ in range(3)], rng.choice((0.0, 0.1, 0.2, 0.3))
        history, is_cached = History(*counts, accumulated, has_moved=True), rng.random() < 0.9
        diff = rng.choice((0.0, 0.05, 0.1, 0.2, math.inf, math.nan))
        expected = decide(config, history, diff, is_cached=is_cached)
        counters = (torch.tensor(value, dtype=torch.float64 if value is accumulated else None) for value in history[:4])
        computes, total = decide_in_tensors(
            config,
            TensorHistory(*counters),
            torch.tensor(diff, dtype=torch.float64),
            torch.tensor(config.residual_diff_threshold, dtype=torch.float64),
            torch.tensor(is_cached),
        )
        assert bool(computes) == expected.compute, (config, history, diff)
        assert float(total) == history.after(expected).accumulated_diff


class Always:
    def decide(self, step: object) -> bool:
        return True


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(decider=Always()), "decider must be None .*runs without Python"),
        (dict(forecaster=DMDCalibratorConfig()), "forecaster must be None or one of FoCaCalibratorConfig, "),
        (dict(forecaster=FoCaCalibratorConfig(by="timestep")), "with by='step' in an exported graph"),
        (dict(policy=Magnitude(ratios=(1.0,))), "probe must be .*ratios up in Python"),
        (dict(shadow=True), "shadow must be False"),
        (dict(force_refresh_step_hint=3), r"pass initial_state\(\) at the step"),
        (dict(cfg_diff_compute_separate=False), "a step sees no other"),
        (dict(guidance_reuse="difference"), "guidance_reuse must be 'off' .*a step sees no other"),
        (dict(enable_dynamic_prune_threshold=True), "applies to all regions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_no_graph_can_contain_is_refused(fields: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        check_exportable(CacheConfig(**fields))


def test_the_default_configuration_can_be_exported():
    check_exportable(CacheConfig())


class Noisy(tiny.Transformer):
    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, ...]:
        return super().forward(hidden_states + torch.randn_like(hidden_states), **others)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny.Plain, r"was not exported, because it cannot be cached\.\nno-chain"),
        (lambda: tiny.TwoLists(broken=True), r"expected: a model that Dynamo captures as one graph"),
        (Noisy, "a forward that draws random numbers"),
    ],
    ids=["no-chain", "graph-break", "effect"],
)
def test_a_model_that_cannot_be_exported_with_its_cache_is_refused(build: Callable[[], nn.Module], reason: str):
    with pytest.raises(NoMatchError, match=reason):
        cachedit_fx.export(tiny.frozen(build()), arguments(), tiny.config())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(NoMatchError, match="found:    training mode"):
        export(tiny.build().train())


def test_a_model_is_exported_in_inference_mode():
    with torch.inference_mode():
        exported = export(tiny.build(num_blocks=2))
        assert bool(exported(exported.arguments(**arguments()), exported.initial_state()).computed)
    assert bool(exported(exported.arguments(**arguments()), exported.initial_state()).computed)


def test_an_export_leaves_no_trace_in_the_model_and_its_compiled_code():
    model = tiny.build()
    before = {*vars(model)}
    export(model, forecaster=None)
    assert {*vars(model)} == before
    assert not every_session(model)


@pytest.mark.slow
def test_a_package_of_aotinductor_decides_like_the_cached_model_in_a_process_without_this_package():
    run = subprocess.run(
        [sys.executable, "examples/export_aoti.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    package, cached, difference = run.stdout.splitlines()[-3:]
    assert package.split("reused steps ")[1] == cached.split("reused steps ")[1] != "[]"
    # Kernels of blocks and of whole regions may sum in another order.
    assert float(difference.rpartition(" ")[2]) < 1e-5
