"""Tuning: what the target can be, fewer steps and other schedulers as alternatives, and what the result shows."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters.polynomial import PolynomialCalibratorConfig
from cachedit_fx.integrations.pipelines import enabled_settings
from cachedit_fx.tuning import TuneResult, generations, load_tuned, tune
from cachedit_fx.tuning.alternatives import FewerStepsMeter, Tried, counted, why_not
from cachedit_fx.tuning.calls import calls_of
from cachedit_fx.tuning.choice import confirmed
from cachedit_fx.tuning.measure import Meter
from cachedit_fx.tuning.points import Alternative, Point, Quality, is_better, verdict
from cachedit_fx.tuning.progress import shown_progress, without_bars
from cachedit_fx.tuning.schedule import Schedule
from cachedit_fx.tuning.search import Pace
from cachedit_fx.tuning.solvers import scheduler_from, solvers_of, with_scheduler
from cachedit_fx.tuning.targets import Budget, Target
from tests import tiny

NUM_STEPS = 16
NEWEST = PolynomialCalibratorConfig(order=0)  # Repeats the newest output, so that the cache does badly.
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
LINEAR = PolynomialCalibratorConfig(order=1, by="timestep")


class Field(nn.Module):
    """A velocity that turns with the timestep."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        turn = 3.0 * timestep[:, None] / 1000
        return (torch.tanh(hidden_states) * torch.cos(turn) + encoder_hidden_states * torch.sin(turn),)


class Pipe:
    """The loop of a pipeline of diffusers."""

    def __init__(self, scheduler: Any = None, transformer: nn.Module | None = None) -> None:
        self.transformer = transformer or Field()
        self.scheduler = scheduler or UniPCMultistepScheduler(**FLOW)

    def __call__(self, prompt: Tensor, num_inference_steps: int, generator: Any = None) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(prompt.shape, generator=generator)
        for timestep in self.scheduler.timesteps:
            velocity = self.velocity(latents, timestep, prompt)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return (latents,)

    def velocity(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        found: Tensor = self.transformer(latents, timestep.expand(len(latents)), encoder_hidden_states=prompt)[0]
        return found


def calls(count: int = 2) -> list[dict[str, Any]]:
    made = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [
        dict(prompt=torch.randn(3, 6, generator=each), generator=each, num_inference_steps=NUM_STEPS) for each in made
    ]


def tuned(pipe: Pipe | None = None, **arguments: Any) -> TuneResult:
    defaults: dict[str, Any] = dict(
        target="fastest", at_least="psnr=40", budget="runs=30", forecasters=(NEWEST,), thresholds=(), confirm=False
    )
    return tune(pipe or Pipe(), calls(), **(defaults | arguments))


@pytest.fixture(scope="module", autouse=True)
def pace() -> Iterator[None]:
    """Assigns all time to the model: measured on a busy machine, the share of such a small model would be near 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations, "Pace", lambda generation, step, num_steps: Pace(float(num_steps), 1.0, num_steps))
        yield


@pytest.fixture(scope="module")
def beaten() -> TuneResult:
    """A result whose alternatives are better than the cache."""
    return tuned()


# The target.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(given="fastest", at_least="psnr=40"), Target("psnr", 40)),
        (dict(given="fastest", at_least={"psnr": 40}), Target("psnr", 40)),
        (dict(given="fastest", at_most="rel_l2=0.05"), Target("rel_l2", 0.05)),
        (dict(given="best", at_least="speedup=2"), Target("speedup", 2)),
        (dict(given="psnr=40"), Target("psnr", 40)),
    ],
)
def test_a_target_is_a_goal_with_a_limit(arguments: dict[str, Any], expected: Target):
    assert Target.of(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(given="fastest"), "needs one limit on the quality, got neither at_least nor at_most"),
        (dict(given="fastest", at_least="speedup=2"), "needs one limit on the quality, got at_least='speedup=2'"),
        (dict(given="fastest", at_least="rel_l2=0.05"), "needs one limit on the quality, got at_least='rel_l2=0.05'"),
        (
            dict(given="fastest", at_least="psnr=40", at_most="rel_l2=1"),
            "needs one limit on the quality, got at_least=",
        ),
        (dict(given="fastest", at_least="ssim=1"), "at_least must be one of psnr, rel_l2, speedup with a number"),
        (dict(given="best", at_least="psnr=40"), "needs one limit on the speed, got at_least='psnr=40'"),
        (dict(given="best", at_most="speedup=2"), "needs one limit on the speed, got at_most='speedup=2'"),
        (dict(given="psnr=40", at_least="speedup=2"), "must be 'fastest' or 'best' if at_least is given"),
        (dict(given="best", at_least="speedup=1"), "speedup must be greater than 1, got 1"),
    ],
)
def test_a_limit_that_does_not_fit_the_goal_raises(arguments: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        Target.of(**arguments)


def test_what_is_spent_of_a_part_is_spent_of_the_whole_budget():
    whole = Budget.of("runs=9")
    part = whole.part(2 / 3)
    part.spend(5)
    assert (part.value, part.left, whole.left) == (6, 1, 4)
    assert whole.part(1.0).value == 4 and not whole.is_over


# Schedulers.


def test_a_flow_matching_scheduler_can_be_replaced_by_the_multistep_solvers():
    own, *others = solvers_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert own.is_own and {other.name for other in others} == {
        "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler",
    }  # fmt: skip
    config = next(other for other in others if other.name == "UniPCMultistepScheduler").scheduler.config
    assert (config.prediction_type, config.use_flow_sigmas, config.flow_shift) == ("flow_prediction", True, 3.0)


def test_a_scheduler_without_a_field_for_the_noise_levels_is_left_out():
    found = {each.name for each in solvers_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))}
    assert "FlowMatchHeunDiscreteScheduler" not in found and "UniPCMultistepScheduler" in found


def test_a_scheduler_for_noise_prediction_is_replaced_by_compatible_ones():
    found = [each.name for each in solvers_of(DDIMScheduler(prediction_type="v_prediction"))]
    assert found[0] == "DDIMScheduler" and "DPMSolverMultistepScheduler" in found
    assert not any(name.startswith("FlowMatch") for name in found)
    assert [each.name for each in solvers_of(DDIMScheduler(), others=False)] == ["DDIMScheduler"]


def test_replacing_a_scheduler_logs_no_warning(caplog: pytest.LogCaptureFixture):
    solvers_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_scheduler_is_restored_after_an_error():
    pipe = Pipe()
    own = pipe.scheduler
    with pytest.raises(KeyError), with_scheduler(pipe, DDIMScheduler()):
        assert pipe.scheduler is not own
        raise KeyError
    assert pipe.scheduler is own


# Alternatives.


def test_a_better_solver_with_fewer_steps_is_reported_when_it_wins(beaten: TuneResult):
    better = beaten.better
    assert (
        better is not None and better.is_reached and better.config is None
    ) or better.num_inference_steps < NUM_STEPS
    assert better.quality.speedup >= beaten.verified.speedup and beaten.choice is None
    assert beaten.config.num_inference_steps == NUM_STEPS
    assert beaten.verdict.startswith(f"{better.solver} with {better.num_inference_steps} steps")
    assert str(beaten).endswith(beaten.verdict)


@pytest.mark.parametrize(
    ("target", "cached", "is_reached", "says"),
    [
        ("psnr=40", (41.0, 3.1), True, "faster than the cached configuration (3.10 times)."),
        ("psnr=40", (40.2, 3.5), True, "as fast as the cached configuration, with a better quality (40.2 dB)."),
        ("psnr=40", (38.0, 4.0), False, "The cached configuration does not reach the target."),
        ("speedup=3", (39.0, 3.0), True, "with a better quality than the cached configuration (39.0 dB)."),
        ("psnr=40", (41.0, 3.8), True, ""),
        ("psnr=40", (41.0, 3.5), True, ""),
        ("speedup=3", (41.0, 3.0), True, ""),
    ],
)
def test_one_sentence_says_whether_an_alternative_is_better(
    target: str, cached: tuple[float, float], is_reached: bool, says: str
):
    goal, known = Target.of(target), Quality(cached[0], 0.02, cached[1], 0.3)
    found = Alternative("UniPCMultistepScheduler", {}, 8, None, Quality(41.2, 0.02, 3.5, 0.3), True)
    worse = Alternative("DDIMScheduler", {}, 9, None, Quality(30.0, 0.02, 3.4, 0.3), False)
    reaches = "UniPC with 8 steps and no cache reaches 41.2 dB at 3.50 times the speed"
    sentence = verdict(goal, known, is_reached, (worse, found))
    assert is_better(goal, found, known, is_reached) == bool(says)
    if says:
        assert sentence.startswith(reaches) and sentence.endswith(says)
    else:
        assert sentence == f"No alternative is better than the cached configuration. The best one: {reaches}."
    assert verdict(goal, known, is_reached, ()) == "" and not is_better(goal, worse, known, is_reached)


def test_the_quality_of_an_alternative_is_that_of_running_it(beaten: TuneResult):
    found = next(each for each in beaten.alternatives if each.config is None and each.scheduler.startswith("UniPC"))
    pipe, other = Pipe(), Pipe(scheduler_from(found.scheduler, found.scheduler_config))
    references = [call.run(pipe) for call in calls_of(calls())]
    outputs = [
        call.run(other) for call in calls_of([c | dict(num_inference_steps=found.num_inference_steps) for c in calls()])
    ]
    peak = max(float(r.max()) for r in references) - min(float(r.min()) for r in references)
    errors = torch.cat([(o - r).square().mean(1) for o, r in zip(outputs, references, strict=True)])
    assert found.quality.psnr == pytest.approx(float(10 * torch.log10(peak**2 / errors).mean()), abs=0.01)
    assert found.quality.speedup == pytest.approx(NUM_STEPS / found.num_inference_steps)


def test_a_solver_that_calls_the_model_twice_per_step_counts_twice(beaten: TuneResult):
    heun = [
        each for each in beaten.alternatives if each.scheduler == "FlowMatchHeunDiscreteScheduler" and not each.config
    ]
    assert heun
    for each in heun:
        assert each.quality.share_computed == pytest.approx((2 * each.num_inference_steps - 1) / NUM_STEPS)


def test_the_steps_of_two_transformers_that_take_turns_are_added():
    pipe = SimpleNamespace(components={"transformer": Field(), "transformer_2": Field()})
    cond, uncond = torch.zeros(1, 6), torch.ones(1, 6)
    with counted(pipe) as count:
        for number, name in enumerate(("transformer", "transformer", "transformer_2")):
            for prompt in (cond, uncond):
                pipe.components[name](torch.zeros(1, 6), torch.tensor([float(number)]), encoder_hidden_states=prompt)
    assert count() == 3


def test_the_cache_is_also_tried_with_the_best_alternative(beaten: TuneResult):
    found = [each for each in beaten.alternatives if each.config is not None]
    assert found
    for each in found:
        mask = each.config.steps_computation_mask
        assert sum(mask) < len(mask) and each.quality.share_computed == pytest.approx(sum(mask) / NUM_STEPS)


def test_the_cached_configuration_is_chosen_unless_the_caller_permits_more(beaten: TuneResult):
    found = tuned(alternatives="choose")
    assert found.choice == found.better and found.verified == found.choice.quality
    assert found.signature["scheduler"] == found.choice.scheduler != beaten.signature["scheduler"]
    assert found.signature["arguments"]["num_inference_steps"] == [found.choice.num_inference_steps]
    assert f"chosen:    {found.choice.name}" in str(found)
    pipe = Pipe()
    without_cache = replace(found, choice=replace(found.choice, config=None))
    assert without_cache.apply(pipe) == {"num_inference_steps": found.choice.num_inference_steps}
    assert type(pipe.scheduler).__name__ == found.choice.scheduler


def test_applying_a_result_enables_the_cache_and_leaves_the_scheduler(beaten: TuneResult):
    pipe = Cached()
    own = pipe.scheduler
    assert beaten.apply(pipe, inner_backend="eager") == {} and pipe.scheduler is own
    settings = enabled_settings(pipe.transformer)
    assert settings is not None and settings.config.steps_computation_mask == beaten.config.steps_computation_mask
    cachedit_fx.disable_cache(pipe)


def test_only_the_scheduler_of_the_pipeline_is_tried_if_told_so():
    found = tuned(schedulers="current", budget="runs=9")
    assert {each.scheduler for each in found.alternatives} == {"UniPCMultistepScheduler"}
    assert {each.num_inference_steps for each in found.alternatives} <= {*range(2, NUM_STEPS)}


def test_the_cache_wins_where_it_is_better():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler())
    found = tuned(pipe, at_least="psnr=60", forecasters=(LINEAR,))  # More than the difference between the solvers.
    assert found.better is None and found.verdict.startswith("No alternative is better than the cached configuration.")


def test_the_best_quality_at_a_speed_is_compared_with_alternatives_of_this_speed():
    found = tuned(target="best", at_least="speedup=3")
    assert found.alternatives and all(each.quality.speedup >= 3 for each in found.alternatives if each.config is None)
    best = max(each.quality.psnr for each in found.alternatives if each.is_reached)
    assert (found.better is not None) == (best > found.verified.psnr)


def test_a_scheduler_that_does_not_run_is_left_out_and_the_own_one_is_restored(caplog: pytest.LogCaptureFixture):
    class Picky(Pipe):
        def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            if type(self.scheduler) is DPMSolverMultistepScheduler:
                raise TypeError("no DPM++ here")
            return super().__call__(*args, **kwargs)

    pipe = Picky()
    own = pipe.scheduler
    with caplog.at_level(logging.INFO):
        found = tuned(pipe, budget="runs=9")
    assert pipe.scheduler is own and "_compiled_call_impl" not in pipe.transformer.__dict__
    assert found.alternatives and "DPM++ 2M" not in {each.solver for each in found.alternatives}
    assert "DPMSolverMultistepScheduler is not tried, because it does not run with this pipeline: no DPM" in caplog.text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([lambda pipe: None], "the calls are functions"),
        ([dict(prompt=1)], "does not contain num_inference_steps"),
        ([dict(num_inference_steps=4, sigmas=[1.0])], "contains sigmas"),
        ([dict(num_inference_steps=4), dict(num_inference_steps=5)], "differ in num_inference_steps"),
        ([dict(num_inference_steps=4)], ""),
    ],
)
def test_alternatives_require_calls_whose_number_of_steps_can_be_changed(given: list[Any], says: str):
    found = why_not(calls_of(given))
    assert says in found and bool(found) == bool(says)


def test_the_result_says_why_no_alternatives_were_tried():
    (call, _) = calls()
    given: dict[str, Any] = dict(budget="runs=1", forecasters=(NEWEST,), thresholds=(), confirm=False)
    found = tune(Pipe(), [lambda pipe: pipe(**call)], target="psnr=20", **given)
    assert not found.alternatives
    assert str(found).endswith(
        "Fewer steps and other schedulers were not tried, because the calls are functions, and their number of steps "
        "cannot be changed."
    )


def test_the_measurements_of_alternatives_are_stored_for_a_resumed_search(tmp_path: Any):
    file = tmp_path / "search.json"
    found = tuned(resume=file, budget="runs=9").alternatives
    known = json.loads(file.read_text())["measured"]
    assert found and {f"{each.scheduler} {each.num_inference_steps} steps" for each in found} <= {*known}


# What the result shows.


def test_the_signature_says_how_many_guidance_branches_there_were(beaten: TuneResult, tmp_path: Any):
    nothing = torch.zeros(3, 6)

    class Guided(Pipe):
        def velocity(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            uncond = super().velocity(latents, timestep, nothing)
            return uncond + 2 * (super().velocity(latents, timestep, prompt) - uncond)

    assert beaten.signature["guidance_branches"] == 1
    found = tuned(Guided(), budget="runs=1", alternatives="off")
    assert load_tuned(found.save(tmp_path / "tuned.json")).signature["guidance_branches"] == 2


def test_the_saved_file_contains_the_alternatives(beaten: TuneResult, tmp_path: Any):
    config, _ = load_tuned(beaten.save(tmp_path / "tuned.yaml"))
    assert config == beaten.config
    content = json.loads(beaten.save(tmp_path / "tuned.json").read_text())["tuned"]
    assert content["choice"] is None and content["verdict"] == beaten.verdict
    assert [each["num_inference_steps"] for each in content["alternatives"]] == [
        each.num_inference_steps for each in beaten.alternatives
    ]


def test_the_table_has_measured_points_and_alternatives_fastest_first(beaten: TuneResult):
    lines = [line for line in str(beaten).splitlines() if "cache" in line and line[3:].split()[0][0].isdigit()]
    speeds = [float(line[3:].split()[0]) for line in lines]
    assert speeds == sorted(speeds)[::-1] and len(lines) >= len(beaten.alternatives)
    (chosen,) = [line for line in lines if line.startswith(" * ")]
    assert f"{beaten.verified.psnr:.1f}" in chosen and "  reached  " in chosen
    measured = [*beaten.alternatives, *(point for point in beaten.frontier if point.is_measured)]
    assert sum("  reached  " in line for line in lines) == sum(each.is_reached for each in measured)


def test_the_plot_shows_the_alternatives_of_each_solver_and_the_target(beaten: TuneResult, tmp_path: Any):
    (axes,) = beaten.plot(tmp_path / "frontier.png").axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"chosen", "with the cache, measured", "fewer steps, UniPC", "target: psnr=40"} <= {*labels}
    assert axes.get_xlabel() == "speed-up of a generation (times, logarithmic)"
    low, high = axes.get_ylim()
    shown = [each.quality.psnr for each in beaten.alternatives] + [40, beaten.verified.psnr]
    assert all(low < psnr < high for psnr in shown)
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_equal_outputs_do_not_flatten_the_plot(beaten: TuneResult):
    exact = replace(beaten, verified=Quality(150.0, 0.0, 1.1, 0.9))
    (axes,) = exact.plot().axes
    assert axes.get_ylim()[1] < 120


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(mask=(1, 0, 1, 0)), "cache, 2 of 4 steps computed"),
        (dict(mask=(1, 0, 1, 0), guided=(1, 1, 0, 1)), "cache, 2 of 4 steps computed, 1 of them guided"),
        (dict(mask=None), "cache, threshold 0.2"),
    ],
)
def test_a_configuration_is_named_by_the_steps_that_it_computes(fields: dict[str, Any], says: str):
    config = CacheConfig(residual_diff_threshold=0.2)
    if fields["mask"]:
        static = dict(steps_computation_mask=fields["mask"], steps_computation_policy="static")
        config = config.override(num_inference_steps=4, **static)
    if "guided" in fields:
        config = config.override(guidance_reuse="difference", guidance_computation_mask=fields["guided"])
    assert Point(config, Quality(40.0, 0.01, 2.0, 0.5), True).name == says
    both = {"transformer": config, "transformer_2": config}
    twice = says.replace("2 of 4", "4 of 8").replace("1 of them", "2 of them")
    assert Point(both, Quality(40.0, 0.01, 2.0, 0.5), True).name == twice


# Progress.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_budget_and_the_best(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    tuned(budget="runs=6")
    lines = terminal.getvalue().split("\r")
    assert any("runs the calls without the cache" in line and "0 of 6 runs" in line for line in lines)
    assert any("steps computed" in line and " of 6 runs, " in line and " left, " in line for line in lines)
    assert any("best: " in line and " dB at " in line for line in lines)
    assert lines[-1].strip() == ""  # It is erased at the end.


def test_a_budget_of_seconds_is_shown_in_seconds(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with shown_progress(True, Budget.of("seconds=300")) as bar:
        bar.show("a candidate")
    assert "0 of 300 s" in terminal.getvalue()


def test_elsewhere_there_is_one_line_at_the_start_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with caplog.at_level(logging.INFO, "cachedit_fx.tuning"):
        tuned(budget="runs=3", alternatives="off")
    first, last = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert first == "tune looks for the fastest with a PSNR of at least 40 dB; budget: runs=3"
    assert last.startswith("tune measured 3 candidates; psnr=40: PSNR ") and file.getvalue() == ""


def test_the_bars_of_the_pipeline_are_off_while_it_is_tuned():
    class Quiet:
        def set_progress_bar_config(self, **config: Any) -> None:
            self._progress_bar_config = config

    new, used = Quiet(), Quiet()
    used.set_progress_bar_config(desc="steps")
    for pipe in (new, used):
        with pytest.raises(KeyError), without_bars(pipe):
            assert pipe._progress_bar_config["disable"]
            raise KeyError
    assert not hasattr(new, "_progress_bar_config") and used._progress_bar_config == {"desc": "steps"}


# With the cache itself.


class Cached(Pipe):
    """A pipeline around a small transformer of blocks, with latents that do not depend on `prompt`."""

    def __init__(self) -> None:
        super().__init__(transformer=tiny.build(num_blocks=3))

    def __call__(self, seed: int, num_inference_steps: int) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        latents, prompt = tiny.latents(seed), tiny.prompt(seed)
        for timestep in self.scheduler.timesteps:
            velocity = tiny.step(self.transformer, prompt, float(timestep) / 1000, latents)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return (latents,)


def test_a_chosen_alternative_with_the_cache_is_confirmed_with_its_scheduler():
    pipe, made = Cached(), calls_of([dict(seed=1, num_inference_steps=8)])
    own = pipe.scheduler
    meter = Meter(pipe, {"transformer": pipe.transformer}, made, [call.run(pipe) for call in made], 1.0)
    _, solver, *_ = solvers_of(own)
    schedule, fewer = Schedule(LINEAR, (0, 1, 3), 5), FewerStepsMeter(meter, "alternative ", 5)
    with with_scheduler(pipe, solver.scheduler):
        simulated = fewer.simulation(schedule)
    search = SimpleNamespace(meter=meter, pace=Pace(8.0, 1.0, 8))
    chosen = confirmed(search, Tried(solver, 5, replace(simulated, share_computed=3 / 8), schedule), confirm=True)
    assert pipe.scheduler is own and chosen.is_confirmed and chosen.config.num_inference_steps == 5
    assert chosen.measured.rel_l2 == pytest.approx(simulated.rel_l2, rel=1e-2)  # The graph rounds differently.
    assert chosen.measured.share_computed == 3 / 8 and any(key.startswith("alternative ") for key in meter.measured)


def test_the_configuration_of_an_alternative_without_the_cache_computes_every_step():
    pipe = Cached()
    cachedit_fx.enable_cache(pipe, CacheConfig(max_warmup_steps=5), inner_backend="eager")
    cached, plain = (each(seed=1, num_inference_steps=5)[0] for each in (pipe, Cached()))
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    cachedit_fx.disable_cache(pipe)
    assert not stats.cached_steps and torch.equal(cached, plain)
