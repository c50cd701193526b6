"""The quality benchmark: its counters, comparisons and output files. The measured figures are not tested."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

import cachedit_fx
from benchmarks import quality, quality_page, quality_shadow
from benchmarks.late_taylor import LateTaylorSeer
from benchmarks.quality_configs import FAMILIES, Config, early_mask, even_mask
from benchmarks.quality_defaults import DEFAULT, default_table
from benchmarks.quality_forecasters import cost_table, forecaster_tables
from benchmarks.quality_frontier import frontier, least_time, psnr_at, reach, worth_timing
from benchmarks.quality_guidance import guidance_table
from benchmarks.quality_metrics import MOST_DB, nearness, psnr, rel_l2, ssim
from benchmarks.quality_models import clips, digits, load_setup
from benchmarks.quality_plot import draw
from benchmarks.quality_runners import FewerSteps, Ours, Runner, UnavailableError, made
from benchmarks.quality_setup import Setup, images_of
from benchmarks.quality_solvers import LEVELS, STEPS, calls_of

NUM_STEPS = 6


def row(
    name: str, share: float, psnr: float, group: str = "a", family: str = "ours", **rest: object
) -> dict[str, object]:
    rest = {
        "psnr_least": psnr - 3,
        "ssim": 0.99,
        "rel_l2": 0.01,
        "accuracy": 1.0,
        "schedule": "",
        "guidance": "",
    } | rest
    return {"family": family, "group": group, "name": name, "share": share, "psnr": psnr, **rest}


ROWS = [row("a", 0.2, 30), row("b", 0.4, 40), row("worse", 0.5, 35), row("c", 0.6, 44, "b"), row("whole", 1.0, 100)]


@pytest.fixture(scope="module")
def setup() -> Setup:
    return digits(2, 2, NUM_STEPS)


@pytest.fixture(scope="module")
def guided() -> Setup:
    return clips(2, 2, NUM_STEPS)


@pytest.fixture(scope="module")
def guided_reference(guided: Setup) -> tuple[torch.Tensor, int]:
    return images_and_flops(Runner(guided))


@pytest.fixture(scope="module")
def reference(setup: Setup) -> tuple[torch.Tensor, int]:
    return images_and_flops(Runner(setup))


def images_and_flops(runner: Runner) -> tuple[torch.Tensor, int]:
    with runner.counting() as counter:
        images = runner.images(0)
    return images, counter.total


def test_psnr_is_computed_from_the_mean_square_and_has_a_maximum():
    reference = torch.zeros(2, 1, 8, 8)
    images = torch.stack([torch.full((1, 8, 8), 0.1), torch.zeros(1, 8, 8)])
    assert psnr(images, reference).tolist() == pytest.approx([20.0, MOST_DB], rel=1e-6)  # float32 0.1


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    image = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    assert ssim(image, image).tolist() == pytest.approx([1, 1, 1])
    nearer, farther = ssim(image + 0.01 * noise, image), ssim(image + 0.1 * noise, image)
    assert (farther < nearer).all() and (nearer < 1).all()


def test_ssim_of_constant_images_depends_only_on_their_brightness():
    # Without variance the formula is (2xy + c1) / (x² + y² + c1).
    x, y = 0.5, 0.25
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    found = ssim(torch.full((1, 1, 9, 9), x), torch.full((1, 1, 9, 9), y)).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_nearness_averages_over_the_images():
    reference = torch.ones(2, 1, 8, 8)
    images = torch.stack([reference[0] + 0.1, reference[1] + 0.01])
    found = nearness(images, reference)
    assert found.psnr == pytest.approx(30, rel=1e-5) and found.psnr_least == pytest.approx(20, rel=1e-5)
    assert found.rel_l2 == pytest.approx(0.055, rel=1e-5)
    assert rel_l2(images, reference).tolist() == pytest.approx([0.1, 0.01], rel=1e-5)


def test_the_frontier_omits_dominated_rows_and_rows_that_save_nothing():
    assert [each["name"] for each in frontier(ROWS)] == ["a", "b", "c"]


def test_a_quality_between_two_configurations_is_interpolated():
    found = reach(ROWS, 35)
    assert found is not None and found.share == pytest.approx(0.3) and not found.is_bound
    assert reach(ROWS, 45) is None


def test_a_quality_below_that_of_the_cheapest_configuration_is_bounded_by_it():
    found = reach(ROWS, 25)
    assert found is not None and found.share == 0.2 and found.is_bound


def test_times_are_interpolated_like_shares_and_the_fastest_group_counts():
    rows = [row("a", 0.2, 30, "a"), row("b", 0.4, 40, "a"), row("c", 0.21, 30, "b"), row("d", 0.41, 40, "b")]
    assert worth_timing(rows, [35]) == ["a", "b", "c", "d"]
    times = {"a": {"cpu_ratio": 0.5}, "b": {"cpu_ratio": 0.7}, "c": {"cpu_ratio": 0.3}, "d": {"cpu_ratio": 0.4}}
    assert least_time(rows, {name: times[name] for name in "ab"}, 35, "cpu_ratio") == pytest.approx(0.6)
    assert least_time(rows, times, 35, "cpu_ratio") == pytest.approx(0.35)
    assert least_time(rows, {}, 35, "cpu_ratio") is None


def test_the_quality_at_a_share_lies_on_the_frontier():
    assert psnr_at(ROWS, 0.3) == pytest.approx(35) and psnr_at(ROWS, 0.5) == pytest.approx(42)
    assert psnr_at(ROWS, 0.7) == 44 and psnr_at(ROWS, 0.1) is None


@pytest.mark.parametrize("kind", ["setup", "guided"])
def test_names_are_unique_and_fields_exist_in_the_configuration(request, kind):
    pipeline = request.getfixturevalue(kind)
    for family, configs in FAMILIES.items():
        names = Counter(config.name for config in configs(pipeline))
        assert max(names.values()) == 1, family
    found = {config.name: config for config in FAMILIES["ours"](pipeline)}
    for config in found.values():
        cachedit_fx.CacheConfig(**config.fields)
    assert any(config.guidance for config in found.values()) is (kind == "guided")
    default = cachedit_fx.CacheConfig.cache_dit_defaults(
        **found[DEFAULT].fields, forecaster=made("cachedit_fx.forecasters", found[DEFAULT])
    )
    assert default == cachedit_fx.CacheConfig()


@pytest.mark.parametrize(("num_steps", "computed"), [(28, 6), (28, 14), (8, 3)])
def test_an_even_mask_computes_the_given_number_of_steps_with_the_first_two_and_the_last(num_steps, computed):
    mask = even_mask(num_steps, computed)
    assert len(mask) == num_steps and sum(mask) == computed
    assert mask[:2] == [1, 1] and mask[-1] == 1


def test_an_early_mask_computes_its_first_half_at_the_beginning():
    assert early_mask(20, 10) == [1] * 5 + [0, 0, 1] * 5
    for num_computed in (4, 5, 8, 14):
        assert sum(early_mask(20, num_computed)) == num_computed and early_mask(20, num_computed)[-1] == 1


def test_every_run_starts_from_the_same_noise(setup):
    assert torch.equal(setup.generate(0), setup.generate(0))


def test_results_become_images():
    assert images_of((torch.zeros(1, 3, 8, 8),)).shape == (1, 3, 8, 8)
    assert images_of(torch.zeros(2, 3, 4, 4).numpy()).shape == (2, 4, 3, 4)
    with pytest.raises(ValueError, match="must return a tensor, an array or a list of pictures, got int"):
        images_of(3)
    with pytest.raises(ValueError, match="--model must be one of 'digits', 'clips', or module:factory, got 'flux'"):
        load_setup("flux", 1, 1)


@pytest.mark.parametrize(("kind", "name"), [*(("", name) for name in LEVELS), *(("guided_", name) for name in STEPS)])
def test_a_solver_makes_the_stated_number_of_calls(request, kind, name):
    setup = request.getfixturevalue("guided" if kind else "setup")
    reference, flops = request.getfixturevalue(f"{kind}reference")
    runner = FewerSteps(setup)
    runner.configure(Config("fewer steps", name, name, {"solver": name, "num_steps": 4}))
    images, executed = images_and_flops(runner)
    runner.close()
    assert executed / flops == pytest.approx(calls_of(name, 4) / NUM_STEPS)
    assert 10 < psnr(images, reference).mean() < MOST_DB  # Similar, but not equal.


@pytest.mark.parametrize(("kind", "name"), [("", "euler"), ("guided_", "unipc")])
def test_the_same_number_of_steps_of_the_same_solver_equals_the_uncached_run(request, kind, name):
    runner = FewerSteps(request.getfixturevalue("guided" if kind else "setup"))
    runner.configure(Config("fewer steps", name, name, {"solver": name, "num_steps": NUM_STEPS}))
    assert torch.equal(runner.images(0), request.getfixturevalue(f"{kind}reference")[0])
    runner.close()


def test_flops_are_counted_over_both_guidance_branches(guided, guided_reference):
    """Two of six steps are reused in both branches, and one more in the second branch."""
    runner = Ours(guided)
    fields = {"Fn_compute_blocks": 0, "steps_computation_mask": [1, 1, 0, 1, 0, 1], "max_warmup_steps": 0}
    fields |= {"steps_computation_policy": "static"}
    shares = []
    for more in ({}, {"guidance_reuse": "difference", "guidance_computation_mask": [1, 1, 1, 0, 1, 1]}):
        runner.configure(Config("ours", "last", "mask", fields | more))
        shares.append(images_and_flops(runner)[1] / guided_reference[1])
    runner.close()
    assert 4 / 6 < shares[0] < 4.3 / 6 and shares[0] - shares[1] == pytest.approx(0.5 / 6, abs=0.01)


def test_the_clips_are_judged_by_their_captions(guided, guided_reference):
    assert guided.accuracy is not None
    share = guided.accuracy(guided_reference[0])
    assert guided_reference[0].shape == (2, 8, 3, 16, 16) and share in (0, 0.5, 1)
    assert guided.accuracy(torch.zeros_like(guided_reference[0])) == 0


def test_our_flops_are_those_of_the_uncached_run_unless_a_mask_reuses_steps(setup, reference):
    runner = Ours(setup)
    shares = []
    for mask in ([1] * NUM_STEPS, [1, 1, 0, 1, 0, 1]):
        fields = {"Fn_compute_blocks": 0, "steps_computation_mask": mask, "steps_computation_policy": "static"}
        runner.configure(Config("ours", "last", "mask", fields | {"max_warmup_steps": 0}))
        with runner.counting() as counter:
            images = runner.images(0)
        shares.append(counter.total / reference[1])
        assert torch.equal(images, reference[0]) is (0 not in mask)
    runner.close()
    assert (
        shares[0] == 1 and 4 / NUM_STEPS < shares[1] < 4.5 / NUM_STEPS
    )  # The operations before and after the blocks run at every step.


def test_an_unavailable_configuration_gives_a_reason(setup):
    runner = Ours(setup)
    with pytest.raises(UnavailableError, match="Fn_compute_blocks=0 leaves no residual to measure"):
        runner.configure(Config("ours", "last", "bad", {"Fn_compute_blocks": 0}))
    with pytest.raises(UnavailableError, match=r"cachedit_fx\.forecasters has no Oracle"):
        runner.configure(Config("ours", "Oracle", "bad", {}, ("Oracle", {})))
    runner.close()


@pytest.fixture
def measured():
    peers = [row("p", 0.5, 38, family="cache-dit"), row("q", 0.9, 50, family="cache-dit")]
    skipped = {"family": "ours", "group": "a", "name": "x", "skipped": "no such thing"}
    found = {
        **{"batch": 10, "inner": "inductor", "rounds": 3, "shadow": [], "tuned": {}},
        "reference": {"images": 20, "flops": 7, "accuracy": 1.0},
        "nearness": [*ROWS, skipped, *peers],
        "times": [
            {"family": "ours", "name": name, "cpu_ratio": ratio, "wall_ratio": ratio, "ms": 9.0}
            for name, ratio in (("a", 0.3), ("b", 0.5))
        ],
        "errors": {"fewer steps": "the worker ended"},
    }
    about = {"command": "python -m benchmarks.quality", "hardware": "a CPU", "versions": {"torch": "2"}}
    return about | {"models": {"digits": found, "clips": found | {"times": [], "errors": {}}}}


def test_the_page_states_the_cost_of_each_quality_and_what_was_left_out(measured):
    text, second = quality_page.tables(measured).split("## Measured: Clips")
    assert "| 45 dB | FLOPs | - | 0.733 | - |" in text
    assert "| 40 dB | FLOPs | 0.400 | 0.567 | 0.706 |" in text
    assert "| 40 dB | time | 0.500 | - | - |" in text
    assert "| 35 dB | FLOPs | 0.300 | ≤ 0.500 | 0.600 |" in text
    assert "- no such thing (ours: x)" in text and "- the worker ended (fewer steps)" in text
    assert "worse" not in text
    assert "| 40 dB | FLOPs | 0.400 | 0.567 | 0.706 |" in second and "| time |" not in second


def test_the_tables_replace_the_text_between_the_markers(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{quality_page.BEGIN}\nold\n{quality_page.END}\nbelow\n", encoding="utf-8")
    for _ in range(2):  # Writing the tables a second time changes nothing.
        quality_page.write_page(page, measured, "plot.svg")
        text = page.read_text(encoding="utf-8")
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
        assert text.count("![PSNR") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="must have a line <!-- quality: begin -->"):
        quality_page.write_page(page, measured, None)


def test_the_plot_is_deterministic(measured, tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(measured, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_run_writes_its_measurements_and_continues_from_them(monkeypatch, tmp_path, capsys):
    asked = []

    def answers(job, keep):
        asked.append((job.family, job.task, len(job.names)))
        keep({"reference": {"images": 10, "flops": 1, "accuracy": None} if job.task == "nearness" else {}})
        for i, name in enumerate(job.names):
            found = row(name, 0.3 + 0.1 * i, 36 + 6 * i, family=job.family)
            if job.task == "time":
                found |= {"cpu_ratio": 0.5, "wall_ratio": 0.5, "ms": 1.0, "uncached_ms": 2.0}
            keep(found)
        return ""

    monkeypatch.setattr(quality, "run", answers)
    monkeypatch.setattr(quality, "tune_all", lambda model: {"psnr40": {"cache_config": {}}})
    monkeypatch.setattr(quality, "correlations", lambda model: [])
    path = tmp_path / "out.json"

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["quality", *arguments])
        quality.main()
        return capsys.readouterr().out

    printed = run("--model", "digits", "--only", quality.QUICK, "--json", str(path))
    found = json.loads(path.read_text(encoding="utf-8"))["models"]["digits"]
    assert {each["family"] for each in found["nearness"]} == set(FAMILIES)
    assert found["tuned"] == {"psnr40": {"cache_config": {}}}
    assert {each["name"] for each in found["times"]} >= {"euler 8", "euler 14"}
    assert "| 40 dB | FLOPs |" in printed and math.isfinite(found["nearness"][0]["share"])
    again = run("--model", "digits", "--from", str(path), "--plot", str(tmp_path / "again.svg"))
    assert again == printed and (tmp_path / "again.svg").exists()
    asked.clear()
    run("--model", "digits", "--from", str(path), "--measure", "images", "--only", "^euler (8|10|14)$")
    assert asked == [("fewer steps", "nearness", 1)]


def test_the_predictions_of_shadow_mode_are_compared_for_every_guidance_branch(monkeypatch, setup, guided):
    for model, pipeline in (("digits", setup), ("clips", guided)):
        monkeypatch.setattr(quality_shadow, "load_setup", lambda *_, found=pipeline: found)
        found = quality_shadow.correlations(model)
        assert len(found) == 4
        for each in found:
            assert 0 < each["steps"] <= NUM_STEPS * (1 + pipeline.is_guided) and -1 <= each["correlation"] <= 1, each


def test_forecasters_are_compared_at_equal_decisions():
    rows = [
        row(f"{schedule} {group}", share, psnr, group, schedule=schedule)
        for schedule, share, quality in (("blocks 5 even", 0.3, (30, 36, 20)), ("blocks 9 even", 0.5, (50, 44, 43)))
        for group, psnr in zip(("last", "FoCa", "DMD"), quality, strict=True)
    ]
    assert forecaster_tables(rows) == {
        "A forecast of what the blocks add": [
            ["forecaster", "5", "9"],
            ["FLOPs", "0.300", "0.500"],
            ["last", "30.0", "**50.0**"],
            ["FoCa", "**36.0**", "44.0"],
            ["DMD", "20.0", "43.0"],
        ]
    }
    costs = {name: rest for name, *rest in cost_table(rows)[1:]}
    assert costs["last"] == ["0.450", "0.400", "0.350"] and costs["FoCa"] == ["-", "0.400", "≤ 0.300"]


def test_guidance_reuse_is_compared_with_the_cache_alone_and_with_cache_dit():
    off = [row("a", 0.4, 34, schedule="s"), row("b", 0.6, 44, schedule="s"), row("c", 0.5, 46)]
    on = [row("d", 0.3, 34, schedule="s", guidance="guided"), row("e", 0.4, 44, schedule="s", guidance="guided")]
    table = guidance_table([*off, *on], [row("f", 0.5, 30), row("g", 0.8, 45)])
    assert [line[0] for line in table[1:]] == ["off, all configurations", "off, these configurations", "guided"]
    assert table[1][2] == "0.450 (1.00, 0.64)" and table[2][2] == "0.520 (1.16, 0.74)"
    assert table[3][1:3] == ["-", "0.360 (0.80, 0.51)"]


def test_the_default_is_compared_with_the_frontier_at_its_share():
    rows = [row(DEFAULT, 0.5, 41), *ROWS, row("tuned", 0.5, 45, "tuned")]
    assert default_table(rows)[1] == [f"{DEFAULT} (default)", "0.500", "41.0", "1.0", "4.0"]
    assert len(default_table(rows[:-1])[1]) == 4


def test_a_forecaster_may_be_given_by_module_and_name():
    late = ("benchmarks.late_taylor:LateTaylorSeer", {"late": True})
    assert made("cachedit_fx.forecasters", Config("ours", "", "", {}, late)) == LateTaylorSeer()
