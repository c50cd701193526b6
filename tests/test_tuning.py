"""Tuning: recording and replay, the search for a schedule, and that the pipeline is not changed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig, load_configs
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters import Forecaster
from cachedit_fx.forecasters.fitted import FittedCalibratorConfig
from cachedit_fx.forecasters.forecaster import Times
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.runtime.instances import records_of
from cachedit_fx.tuning import TuneResult, check_signature, generations, load_tuned, tune
from cachedit_fx.tuning.cached import config_of, measure_cached, threshold_config
from cachedit_fx.tuning.calls import as_tensor, calls_of
from cachedit_fx.tuning.fit import fitting
from cachedit_fx.tuning.measure import Measured, Meter
from cachedit_fx.tuning.problems import RecordedRun, problems_of
from cachedit_fx.tuning.recording import Recorder, Steps, handled
from cachedit_fx.tuning.saved import config_to
from cachedit_fx.tuning.schedule import Schedule, cost_of
from cachedit_fx.tuning.search import Pace
from cachedit_fx.tuning.simulate import Simulation
from cachedit_fx.tuning.targets import Budget, Target
from tests import tiny
from tests.tiny_pipelines import PIPELINES

NUM_STEPS = 12
LINEAR = PolynomialCalibratorConfig(order=1, by="timestep")


class Field(nn.Module):
    """A velocity that depends on the latents, the timestep and the prompt."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = nn.Linear(6, 6)
        self.num_runs = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        self.num_runs += 1
        turn = 2.0 * timestep[:, None]
        return (torch.tanh(self.mix(hidden_states)) * torch.cos(turn) + encoder_hidden_states * torch.sin(turn),)


class Euler:
    """A scheduler whose `step` records the guided outputs that it receives."""

    def __init__(self) -> None:
        self.config, self.sigmas = {"shift": 1.0}, torch.ones(1)
        self.received: list[Tensor] = []

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, eta: float = 0.0) -> tuple[Tensor]:
        self.received.append(model_output.clone())
        return (sample + model_output / (len(self.sigmas) - 1) * -1.0,)


class Stepped:
    """`Pipe` with a scheduler that makes the steps, as in diffusers; `copies` steps by a copy of it besides."""

    def __init__(self, copies: int = 0, extra: int = 0) -> None:
        self.transformer = Field().eval().requires_grad_(False)
        self.scheduler, self.copies, self.extra = Euler(), copies, extra

    def __call__(self, prompt: Tensor, generator: Any = None) -> tuple[Tensor]:
        self.scheduler.sigmas = sigmas = torch.linspace(1, 0, NUM_STEPS + 1)
        copied = copy.deepcopy(self.scheduler)
        assert "eta" in inspect.signature(self.scheduler.step).parameters
        latents = torch.randn(prompt.shape, generator=generator)
        for now in sigmas[:-1]:
            timestep = now.expand(len(latents))
            cond = self.transformer(latents, timestep, encoder_hidden_states=prompt)[0]
            uncond = self.transformer(latents, timestep, encoder_hidden_states=torch.zeros_like(prompt))[0]
            for _ in range(self.copies):
                copied.step(cond, now, latents)
            for _ in range(1 + self.extra):
                latents = self.scheduler.step(uncond + 3.0 * (cond - uncond), now, sample=latents)[0]
        return (latents,)


class Pipe:
    """Euler steps from 1 to 0, with guidance: two calls of the transformer per step."""

    def __init__(self) -> None:
        self.transformer = Field().eval().requires_grad_(False)
        self.scheduler = SimpleNamespace(config={"shift": 1.0}, sigmas=None)

    def __call__(
        self, prompt: Tensor, num_inference_steps: int = NUM_STEPS, generator: Any = None, scale: float = 2.0
    ) -> tuple[Tensor]:
        sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        self.scheduler.sigmas = sigmas
        latents, nothing = torch.randn(prompt.shape, generator=generator), torch.zeros_like(prompt)
        for now, after in itertools.pairwise(sigmas):
            timestep = now.expand(len(latents))
            cond = self.transformer(latents, timestep, encoder_hidden_states=prompt)[0]
            uncond = self.transformer(latents, timestep, encoder_hidden_states=nothing)[0]
            latents = latents + (after - now) * (uncond + scale * (cond - uncond))
        return (latents,)


def calls(count: int = 2) -> list[dict[str, Any]]:
    made = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [dict(prompt=torch.randn(3, 6, generator=each), generator=each) for each in made]


def tuned(pipe: Pipe | None = None, **arguments: Any) -> TuneResult:
    defaults: dict[str, Any] = dict(target="psnr=45", budget="runs=14", thresholds=(), confirm=False)
    return tune(pipe or Pipe(), calls(), **(defaults | arguments))


@pytest.fixture(scope="module", autouse=True)
def pace() -> Iterator[None]:
    """Assigns all time to the model: measured on a busy machine, the share of such a small model would be near 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations, "Pace", lambda generation, step, num_steps: Pace(float(num_steps), 1.0, num_steps))
        yield


@pytest.fixture(scope="module")
def result() -> TuneResult:
    return tuned()


# The search.


def test_the_target_is_reached_with_few_steps_and_for_other_calls(result):
    assert result.is_reached and result.verified.psnr >= result.predicted.psnr >= 45
    assert result.verified.share_computed <= 0.6 and result.verified.speedup > 1
    assert result.config.is_static and len(result.config.steps_computation_mask) == NUM_STEPS
    assert (result.config.reach, result.config.probe, result.config.Fn_compute_blocks) == ("output", "none", 0)
    pipe, mask = Pipe(), result.config.steps_computation_mask
    assert math.isclose(sum(mask) / NUM_STEPS, result.verified.share_computed)
    call = dict(prompt=torch.randn(8, 6, generator=torch.Generator().manual_seed(9)))
    (new,) = calls_of([call])
    schedule = Schedule(result.config.forecaster, tuple(i for i, m in enumerate(mask) if m), NUM_STEPS)
    reference = new.run(pipe)
    with Simulation(pipe.transformer, schedule).simulating():
        error = (new.run(pipe) - reference).square().mean()
    assert 10 * math.log10((reference.max() - reference.min()) ** 2 / error) > 40  # Other noise has another peak.


def test_a_speedup_target_is_met_by_the_schedule_of_the_best_quality():
    found = tuned(target={"speedup": 1.5}, budget={"runs": 10})
    assert found.is_reached and found.verified.speedup >= 1.5
    rivals = [p.quality for p in found.frontier if p.is_measured and p.quality.speedup >= 1.5]
    assert found.verified.psnr == max(rival.psnr for rival in rivals)


def test_a_relative_error_can_be_the_target():
    found = tuned(target={"rel_l2": 0.01})
    assert found.is_reached and found.verified.rel_l2 <= found.predicted.rel_l2 <= 0.01


def test_the_frontier_has_every_number_of_steps(result):
    shares = sorted({round(point.quality.share_computed * NUM_STEPS) for point in result.frontier})
    assert shares == list(range(1, NUM_STEPS))
    assert [p.quality.speedup for p in result.frontier] == sorted(p.quality.speedup for p in result.frontier)[::-1]


def test_an_unreachable_target_warns(caplog):
    found = tuned(target="psnr=140", budget="runs=3")
    assert not found.is_reached
    (record,) = caplog.records
    assert "target psnr=140 was not reached" in record.getMessage()


def test_the_pipeline_is_not_changed():
    pipe = Pipe()
    before = dict(pipe.transformer.__dict__)
    tuned(pipe, budget="runs=2")
    assert {k: v for k, v in pipe.transformer.__dict__.items() if k != "num_runs"} == {
        k: v for k, v in before.items() if k != "num_runs"
    }


def test_a_search_resumes_from_its_file(tmp_path):
    pipe, again, file = Pipe(), Pipe(), tmp_path / "search.json"
    first = tuned(pipe, resume=file)
    known = json.loads(file.read_text())["measured"]
    second = tuned(again, resume=file)
    assert second.verified.share_computed <= first.verified.share_computed  # The same number of additional runs.
    assert json.loads(file.read_text())["measured"].items() >= known.items()
    meter = Meter(None, {"transformer": Field()}, (), [call.run(Pipe()) for call in calls_of(calls())], 1.0, file)
    key, entry = next(iter(known.items()))
    assert meter.is_measured(key) and list(meter.measure(key, pytest.fail, pytest.fail).errors) == entry["errors"]


# Two transformers.


@pytest.fixture(scope="module")
def wan22() -> tuple[Any, TuneResult, dict[str, list[list[int]]]]:
    real = PIPELINES["wan22"]
    pipe = real.build(num_blocks=2)
    given = [lambda p, seed=seed: real.run(p, seed=seed, num_steps=8) for seed in (1, 2)]
    arguments = dict(target="speedup=1.3", budget="runs=5", thresholds=())
    found = tune(pipe, given, forecasters=[FittedCalibratorConfig(memory=2), LINEAR], **arguments)
    records = {name: records_of(pipe.components[name], every_generation=False) for name in found.config}
    return pipe, found, {n: [stats.cached_steps for r in of for stats in r.stats] for n, of in records.items()}


def guidance_mask(config: CacheConfig) -> tuple[int, ...]:
    return tuple(config.guidance_computation_mask or (1,) * config.num_inference_steps)


def test_each_of_two_transformers_has_a_configuration_of_its_own(wan22, tmp_path, caplog):
    pipe, found, _ = wan22
    first, second = found.config["transformer"], found.config["transformer_2"]
    masks = [[*config.steps_computation_mask] for config in (first, second)]
    assert [len(mask) for mask in masks] == [first.num_inference_steps, second.num_inference_steps]
    assert sum(map(len, masks)) == 8 and masks[0][0] == masks[1][0] == 1
    num_guided = sum(config.num_inference_steps - sum(guidance_mask(config)) for config in (first, second))
    assert found.is_confirmed and found.verified.share_computed == (sum(map(sum, masks)) - num_guided / 2) / 8 < 1
    for name in ("tuned.json", "tuned.yaml"):
        path = found.save(tmp_path / name)
        assert load_tuned(path) == (found.config, found.signature)
        assert load_configs(path) == {"cache_config": found.config, "tuned_on": found.signature}
    assert check_signature(pipe, found.signature) == []
    pipe.register_to_config(boundary_ratio=0.5)
    assert check_signature(pipe, found.signature) == [
        "pipeline_config: tuned on {'boundary_ratio': 0.8}, found {'boundary_ratio': 0.5}"
    ]
    pipe.register_to_config(boundary_ratio=0.8)


def test_the_cache_of_two_transformers_does_what_the_simulation_predicts(wan22):
    _, found, cached_steps = wan22
    (simulated,) = [point for point in found.frontier if point.is_measured and point.config == found.config]
    for name, config in found.config.items():
        mask, guidance = config.steps_computation_mask, guidance_mask(config)
        reused = [step for step, is_computed in enumerate(mask) if not is_computed]
        guided = [step for step, is_computed in enumerate(mask) if not is_computed or not guidance[step]]
        assert cached_steps[name] == [reused, guided]  # In the run that confirmed the result.
    assert found.verified.rel_l2 > 1e-6
    assert found.verified.rel_l2 == pytest.approx(simulated.quality.rel_l2, rel=1e-3)  # The graph rounds differently.


# The parts of the search.


def test_a_replay_computes_and_forecasts_as_the_schedule_says():
    pipe, schedule = Pipe(), Schedule(LINEAR, (0, 1, 4), 6)
    computed: list[Tensor] = []
    simulation = Simulation(pipe.transformer, schedule)
    with simulation.simulating():
        run = pipe.transformer._compiled_call_impl
        pipe.transformer._compiled_call_impl = lambda *a, **k: computed.append(run(*a, **k)[0]) or (computed[-1],)
        calls_of(calls())[0].run(lambda **given: pipe(num_inference_steps=6, **given))
        pipe.transformer._compiled_call_impl = run
    assert (simulation.num_computed, simulation.num_calls, pipe.transformer.num_runs) == (6, 12, 6)
    for guidance_branch in (0, 1):
        made = computed[guidance_branch::2]
        at = [k / 6 for k in range(6)]
        for step, known in ((2, (1, 0)), (3, (1, 0)), (5, (4, 1))):
            factors = LINEAR.numbers(Times(tuple(at[k] for k in known), at[step]))
            expected = sum(f * made[k] for f, k in zip(factors, known, strict=True))
            # Positions are differences of float32 timesteps.
            torch.testing.assert_close(made[step], expected, rtol=1e-5, atol=1e-5)


def test_a_schedule_that_computes_all_steps_is_bitwise_exact():
    pipe, (call, _) = Pipe(), calls_of(calls())
    reference = call.run(pipe)
    with Simulation(pipe.transformer, Schedule(LINEAR, tuple(range(NUM_STEPS)), NUM_STEPS)).simulating():
        assert torch.equal(call.run(pipe), reference)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "zimage"])
def test_branches_and_steps_of_real_pipelines_are_recorded(name):
    real = PIPELINES[name]
    pipe = real.build(num_blocks=2)
    recorder = Recorder({"transformer": pipe.transformer}, pipe.scheduler, 1 << 30)
    with recorder.recording():
        reference = real.run(pipe, num_steps=5)
    (trajectory,) = recorder.trajectories()
    assert recorder.parts == (("transformer", 5),) and len(recorder._branches) == max(1, len(real.guidance_branches))
    assert trajectory.gram.shape == (5, 5) and len({*trajectory.timesteps}) == 5
    with Simulation(pipe.transformer, Schedule(LINEAR, (0, 1, 2, 3, 4), 5)).simulating():
        assert torch.equal(as_tensor((real.run(pipe, num_steps=5),)), as_tensor((reference,)))
    with Simulation(pipe.transformer, Schedule(LINEAR, (0, 1, 3), 5)).simulating():
        assert as_tensor((real.run(pipe, num_steps=5),)).isfinite().all()


def test_the_outputs_after_guidance_are_recorded():
    pipe, (call, _) = Stepped(copies=1), calls_of(calls())
    recorder = Recorder({"transformer": pipe.transformer}, pipe.scheduler, 1 << 30)
    with recorder.recording():
        call.run(pipe)
    assert Euler.step.__qualname__ == "Euler.step" and not hasattr(Euler.step, "__wrapped__")
    (trajectory,) = recorder.trajectories()
    guided = torch.stack([output.flatten() for output in pipe.scheduler.received]).double()
    np.testing.assert_allclose(trajectory.gram, guided @ guided.T, rtol=1e-12)
    (one,) = problems_of([RecordedRun(trajectory, np.ones(NUM_STEPS))], "step")
    each = [gram / gram.sum() for gram in trajectory.branches]
    assert len(each) == 2 and fitting(FittedCalibratorConfig(), [one]).gram == pytest.approx((each[0] + each[1]) / 2)
    # The forecast of a guided output is the same sum of guided outputs, so the predicted cost of one gap is its error.
    schedule = Schedule(LINEAR, tuple(step for step in range(NUM_STEPS) if step != 5), NUM_STEPS)
    weights = np.full(NUM_STEPS, -1 / NUM_STEPS)
    (one,) = problems_of([RecordedRun(trajectory, weights)], "timestep")
    whole = weights @ trajectory.gram @ weights
    factors = LINEAR.numbers(Times((4 / NUM_STEPS, 3 / NUM_STEPS), 5 / NUM_STEPS))
    missed = factors[0] * guided[4] + factors[1] * guided[3] - guided[5]
    expected = float(missed.square().sum()) / NUM_STEPS**2 / whole
    assert cost_of([one], LINEAR, schedule.computed) == pytest.approx(expected, rel=1e-3)  # float32 timesteps.


def test_without_one_scheduler_step_per_step_every_guidance_branch_is_recorded():
    pipe, (call, _) = Stepped(extra=1), calls_of(calls())
    recorder = Recorder({"transformer": pipe.transformer}, pipe.scheduler, 1 << 30)
    with recorder.recording():
        call.run(pipe)
    assert len(pipe.scheduler.received) == 2 * NUM_STEPS and len(recorder.trajectories()) == 2


def test_a_solver_that_calls_twice_at_a_timestep_is_one_branch():
    prompt, other = torch.zeros(1, 6), torch.ones(1, 6)
    steps = Steps(Field())

    def at(moment: float, with_prompt: Tensor) -> tuple[int, int]:
        step = steps.next((torch.zeros(1, 6), torch.tensor([moment]), with_prompt), {})
        return step.guidance_branch, step.number

    assert [at(t, prompt) for t in (1.0, 0.8, 0.8, 0.6)] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    steps = Steps(Field())
    pairs = [(1.0, prompt), (1.0, other), (0.8, other), (0.8, prompt)]
    assert [at(*pair) for pair in pairs] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    steps = Steps(Field())  # The prompts are rebuilt at every call.
    assert [at(t, torch.zeros(1, 6)) for t in (1.0, 1.0, 0.8, 0.8)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_an_exception_does_not_change_the_module():
    module = Field()
    with pytest.raises(KeyError), handled(module, lambda step, run: {}["gone"]):
        module(torch.zeros(1, 6), torch.ones(1), torch.zeros(1, 6))
    assert "_compiled_call_impl" not in module.__dict__


def test_a_measurement_derives_its_metrics_from_the_errors():
    measured = Measured((0.01, 0.0001), (1.0, 0.25), peak=1.0, share_computed=0.5, seconds=1.0)
    assert measured.psnr == pytest.approx(30.0) and measured.rel_l2 == pytest.approx((0.1 + 0.02) / 2)
    assert measured.margin_db == pytest.approx(10.0)  # 20 and 40 dB: a deviation of 14.1 over the root of 2.
    assert measured.margin_rel_l2 == pytest.approx(0.04)
    single = Measured((0.01,), (1.0,), 1.0, 0.5, 1.0)
    assert single.margin_db == 0.5 and single.margin_rel_l2 == pytest.approx(0.1 * (10**0.025 - 1))
    assert Measured((0.0,), (1.0,), 1.0, 0.5, 1.0).psnr == 100.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("psnr=35", Target("psnr", 35)),
        ({"rel_l2": 0.05}, Target("rel_l2", 0.05)),
        (" speedup = 2", Target("speedup", 2)),
    ],
)
def test_targets_are_parsed(given, expected):
    assert Target.of(given) == expected


def test_budgets_are_parsed():
    assert [(b.kind, b.value) for b in map(Budget.of, (60, "runs=3", {"seconds": 1}))] == [
        ("seconds", 60), ("runs", 3), ("seconds", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "returned",
    [torch.zeros(2, 3), (torch.zeros(2, 3),), [torch.zeros(3), torch.zeros(3)], torch.zeros(2, 3).numpy()],
    ids=["tensor", "tuple", "list", "array"],
)
def test_the_return_value_of_a_call_becomes_a_tensor(returned):
    assert as_tensor(returned).shape == (2, 3) and as_tensor(returned).dtype == torch.float32


def test_uint8_images_are_scaled_to_0_to_1():
    assert as_tensor(torch.full((1, 2), 255, dtype=torch.uint8)).eq(1).all()


# Files and signatures.


@pytest.mark.parametrize("name", ["tuned.yaml", "tuned.json"])
def test_a_saved_result_can_be_loaded(result, tmp_path, name):
    config, signature = load_tuned(result.save(tmp_path / name))
    assert (config, signature) == (result.config, result.signature)
    assert signature["num_steps"] == NUM_STEPS and signature["latents"] == [6]
    assert isinstance(config, CacheConfig)


def test_load_configs_reads_a_saved_result(result, tmp_path):
    known = load_configs(result.save(tmp_path / "tuned.json"))
    assert known == {"cache_config": result.config, "tuned_on": result.signature}


def test_saving_a_forecaster_without_a_name_raises():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Forecaster):
        pass

    with pytest.raises(ConfigError, match="must have a name, got a Mine"):
        config_to(CacheConfig(forecaster=Mine()))
    assert config_to(CacheConfig(forecaster=None)) == {"forecaster": None}


def test_enable_cache_warns_once_about_a_size_it_was_not_tuned_on(caplog):
    module = tiny.build()
    fields = tiny.fields(inner_backend="eager")
    signature = {"transformer": "Transformer", "latents": [tiny.TOKENS, 4]}
    cachedit_fx.enable_cache(module, **fields, tuned_on=signature)
    with torch.no_grad():
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
        assert "was tuned on" not in caplog.text
        for _ in range(2):
            tiny.step(module, tiny.prompt(), 1.0, tiny.latents(tokens=9))
    (record,) = [record for record in caplog.records if "was tuned on" in record.getMessage()]
    assert "latents: tuned on [6, 4], found [9, 4]" in record.getMessage()


def test_enable_cache_warns_about_a_model_it_was_not_tuned_on(caplog):
    cachedit_fx.enable_cache(tiny.build(), inner_backend="eager", tuned_on={"transformer": "FluxTransformer2DModel"})
    assert "transformer: tuned on FluxTransformer2DModel, found Transformer" in caplog.text


def test_a_different_pipeline_or_call_is_reported(result, caplog):
    pipe = Pipe()
    assert check_signature(pipe, result.signature) == [] and not caplog.records
    pipe.scheduler.config = {"shift": 3.0}
    found = check_signature(pipe, result.signature)
    assert found == ["scheduler_config: tuned on {'shift': 1.0}, found {'shift': 3.0}"]
    assert "tuned on something else" in caplog.records[0].getMessage()
    numbers = tuned(budget="runs=1").signature
    assert (
        check_signature(Pipe(), numbers, dict(num_inference_steps=50)) == []
    )  # It was not given, so it is not compared.


def test_the_numeric_arguments_of_a_call_are_compared():
    pipe = Pipe()
    given = [call | dict(num_inference_steps=NUM_STEPS, scale=s) for call, s in zip(calls(), (1.5, 2.0), strict=True)]
    found = tune(pipe, given, target="psnr=30", budget="runs=1", thresholds=(), confirm=False)
    assert found.signature["arguments"] == {"num_inference_steps": [NUM_STEPS], "scale": [1.5, 2.0]}
    assert check_signature(pipe, found.signature, given[0]) == []
    assert check_signature(pipe, found.signature, dict(num_inference_steps=50, scale=1.5)) == [
        "num_inference_steps: tuned on [12], found [50]"
    ]


def test_the_plot_shows_measured_predicted_and_chosen(result, tmp_path):
    (axes,) = result.plot(tmp_path / "frontier.png").axes
    assert axes.get_legend_handles_labels()[1] == [
        *("with the cache, predicted", "with the cache, measured", "chosen", "target: psnr=45")
    ]
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_the_result_prints_target_prediction_and_verification(result):
    first, predicted, verified, *_ = str(result).splitlines()
    assert first == "psnr=45 reached (the fastest with a PSNR of at least 45 dB)"
    assert predicted.startswith("  predicted: PSNR ") and "computed" in verified


def test_a_pipeline_of_one_step_is_refused():
    with pytest.raises(ConfigError, match="must all have the same number of steps, more than 1, got"):
        tune(Pipe(), [dict(prompt=torch.zeros(1, 6), num_inference_steps=1)], target="psnr=30")


# With the cache itself.


class Cached:
    """A pipeline around a small transformer of blocks."""

    def __init__(self) -> None:
        self.transformer = tiny.build(num_blocks=3)

    def __call__(self, seed: int = 1) -> tuple[Tensor]:
        latents, prompt = tiny.latents(seed), tiny.prompt(seed)
        for moment in tiny.TIMES:
            latents = latents - tiny.step(self.transformer, prompt, moment, latents) / len(tiny.TIMES)
        return (latents,)


def test_the_cache_does_what_the_replay_predicts_and_is_disabled_afterwards():
    pipe, given = Cached(), [dict(seed=1), dict(seed=2)]
    found = tune(pipe, given, target="speedup=2", budget="runs=3", forecasters=[LINEAR], thresholds=())
    assert found.is_confirmed and "_compiled_call_impl" not in pipe.transformer.__dict__
    mask, made = found.config.steps_computation_mask, calls_of(given)
    meter = Meter(pipe, {"transformer": pipe.transformer}, made, [call.run(pipe) for call in made], 1.0)
    replayed = meter.simulation(Schedule(LINEAR, tuple(i for i, m in enumerate(mask) if m), len(mask)))
    assert replayed.rel_l2 > 1e-4
    assert found.verified.rel_l2 == pytest.approx(replayed.rel_l2, rel=1e-2)  # The graph rounds differently.


def test_a_threshold_is_measured_with_the_cache():
    pipe, (call,) = Cached(), calls_of([{}])
    meter = Meter(pipe, {"transformer": pipe.transformer}, (call,), [call.run(pipe)], 1.0)
    never, often = (measure_cached(meter, threshold_config(t, LINEAR), f"{t}") for t in (0.0, 0.5))
    assert never.share_computed == 1.0 and never.rel_l2 < 1e-5  # The graph rounds differently.
    assert often.share_computed <= 1.0 and often.rel_l2 > never.rel_l2


# Guidance reuse.


def test_a_simulated_schedule_with_guided_steps_is_what_the_cache_does(caplog):
    real = PIPELINES["wan"]
    pipe, (call,) = real.build(num_blocks=2), calls_of([lambda p: real.run(p, num_steps=8)])
    recorder = Recorder({"transformer": pipe.transformer}, pipe.scheduler, 1 << 30)
    with recorder.recording():
        reference = call.run(pipe)
    problems = problems_of([RecordedRun(each, np.ones(8)) for each in recorder.trajectories()], "step")
    fitted = fitting(FittedCalibratorConfig(memory=2), problems)
    schedule = Schedule(fitted, (0, 1, 2, 4, 6), 8, guided=(2, 6))
    meter = Meter(pipe, {"transformer": pipe.transformer}, (call,), [reference], 1.0)
    simulated = meter.simulation(schedule)
    config = config_of(schedule, ["transformer"])
    assert (config.guidance_reuse, sum(config.guidance_computation_mask)) == ("difference", 6)
    guided = []

    def run(call: Any) -> Tensor:
        output = call.run(pipe)
        for record in records_of(pipe.transformer, every_generation=False):
            guided.extend(stats.guided_steps for stats in record.stats)
        return output

    cachedit_fx.enable_cache(pipe, config, inner_backend="eager")
    cached = meter.measure("cached", run, lambda: 1.0)
    cachedit_fx.disable_cache(pipe)
    assert guided == [[], [2, 6]] and "no effect" not in caplog.text
    assert simulated.share_computed == schedule.share_computed == 0.5
    assert simulated.rel_l2 > 1e-5 and cached.rel_l2 == pytest.approx(simulated.rel_l2, rel=1e-3)
    without = meter.simulation(dataclasses.replace(schedule, guided=()))
    assert abs(without.rel_l2 / simulated.rel_l2 - 1) > 0.01  # The guided steps have an effect.
    meter.measured.clear()
    other = meter.simulation(dataclasses.replace(schedule, forecaster=dataclasses.replace(fitted, difference=None)))
    assert other.rel_l2 != simulated.rel_l2  # So do the factors of the difference.
