"""The quality benchmark: its counters, comparisons and output files. The measured figures are not tested."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

import cachedit_fx
from benchmarks import quality, quality_forecasters, quality_page, quality_shadow
from benchmarks.late_taylor import LateTaylorSeer
from benchmarks.quality_configs import FAMILIES, Config, even_mask
from benchmarks.quality_frontier import frontier, least_time, reach, worth_timing
from benchmarks.quality_metrics import MOST_DB, nearness, psnr, rel_l2, ssim
from benchmarks.quality_plot import draw
from benchmarks.quality_runners import FewerSteps, Ours, Runner, UnavailableError, made
from benchmarks.quality_setup import Setup, digits, images_of, load_setup
from benchmarks.quality_solvers import SOLVERS, calls_of

NUM_STEPS = 6


def row(name: str, share: float, psnr: float, group: str = "a", family: str = "ours") -> dict[str, object]:
    rest = {"psnr_least": psnr - 3, "ssim": 0.99, "rel_l2": 0.01, "accuracy": 1.0}
    return {"family": family, "group": group, "name": name, "share": share, "psnr": psnr, **rest}


ROWS = [row("a", 0.2, 30), row("b", 0.4, 40), row("worse", 0.5, 35), row("c", 0.6, 44, "b"), row("whole", 1.0, 100)]


@pytest.fixture(scope="module")
def setup() -> Setup:
    return digits(2, 2, NUM_STEPS)


@pytest.fixture(scope="module")
def reference(setup: Setup) -> tuple[torch.Tensor, int]:
    runner = Runner(setup)
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


def test_names_are_unique_and_fields_exist_in_the_configuration():
    for family, configs in FAMILIES.items():
        names = Counter(config.name for config in configs(28))
        assert max(names.values()) == 1, family
    for config in FAMILIES["ours"](28):
        cachedit_fx.CacheConfig(**config.fields)


@pytest.mark.parametrize(("num_steps", "computed"), [(28, 6), (28, 14), (8, 3)])
def test_an_even_mask_computes_the_given_number_of_steps_with_the_first_two_and_the_last(num_steps, computed):
    mask = even_mask(num_steps, computed)
    assert len(mask) == num_steps and sum(mask) == computed
    assert mask[:2] == [1, 1] and mask[-1] == 1


def test_every_run_starts_from_the_same_noise(setup):
    assert torch.equal(setup.generate(0), setup.generate(0))


def test_results_become_images():
    assert images_of((torch.zeros(1, 3, 8, 8),)).shape == (1, 3, 8, 8)
    assert images_of(torch.zeros(2, 3, 4, 4).numpy()).shape == (2, 4, 3, 4)
    with pytest.raises(ValueError, match="must return a tensor, an array or a list of pictures, got int"):
        images_of(3)
    with pytest.raises(ValueError, match="--pipeline must be 'digits' or module:factory, got 'flux'"):
        load_setup("flux", 1, 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_makes_the_stated_number_of_calls(setup, reference, name):
    runner = FewerSteps(setup)
    runner.configure(Config("fewer steps", name, name, {"solver": name, "num_steps": 4}))
    with runner.counting() as counter:
        images = runner.images(0)
    runner.close()
    assert counter.total / reference[1] == pytest.approx(calls_of(name, 4) / NUM_STEPS)
    assert 10 < psnr(images, reference[0]).mean() < MOST_DB  # Similar, but not equal.


def test_the_same_number_of_euler_steps_equals_the_uncached_run(setup, reference):
    runner = FewerSteps(setup)
    runner.configure(Config("fewer steps", "euler", "euler", {"solver": "euler", "num_steps": NUM_STEPS}))
    assert torch.equal(runner.images(0), reference[0])
    runner.close()


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
    return {
        "command": "python -m benchmarks.quality",
        "hardware": "a CPU",
        "versions": {"torch": "2"},
        **{"pipeline": "digits", "batch": 10, "inner": "inductor", "rounds": 3},
        "reference": {"images": 20, "flops": 7, "accuracy": 1.0},
        "nearness": [*ROWS, skipped, *peers],
        "times": [
            {"family": "ours", "name": name, "cpu_ratio": ratio, "wall_ratio": ratio, "ms": 9.0}
            for name, ratio in (("a", 0.3), ("b", 0.5))
        ],
        "errors": {"fewer steps": "the worker ended"},
    }


def test_the_page_states_the_cost_of_each_quality_and_what_was_left_out(measured):
    text = quality_page.tables(measured)
    assert "| 45 dB | FLOPs | - | 0.733 | - |" in text
    assert "| 40 dB | FLOPs | 0.400 | 0.567 | 0.706 |" in text
    assert "| 40 dB | time | 0.500 | - | - |" in text
    assert "| 35 dB | FLOPs | 0.300 | ≤ 0.500 | 0.600 |" in text
    assert "- no such thing (ours: x)" in text and "- the worker ended (fewer steps)" in text
    assert "worse" not in text


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


def test_a_run_writes_its_measurements(monkeypatch, tmp_path, capsys):
    def answers(job):
        rows = [row(name, 0.3 + 0.1 * i, 36 + 6 * i, family=job.family) for i, name in enumerate(job.names)]
        if job.task == "time":
            rows = [{**each, "cpu_ratio": 0.5, "wall_ratio": 0.5, "ms": 1.0, "uncached_ms": 2.0} for each in rows]
        return {"images": 10, "flops": 1, "accuracy": None}, rows, ""

    monkeypatch.setattr(quality, "run", answers)
    monkeypatch.setattr(
        quality_shadow, "load_setup", lambda name, *_: load_setup(name, 2, 2)
    )  # One call of two images.
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["quality", "--only", quality.QUICK, "--json", str(path)])
    quality.main()
    printed = capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {each["family"] for each in found["nearness"]} == set(FAMILIES)
    assert len(found["shadow"]) == 4
    for each in found["shadow"]:
        assert 0 < each["steps"] < 28 and -1 <= each["correlation"] <= 1, each
    assert {each["name"] for each in found["times"]} >= {"euler 8", "euler 14"}
    assert "| 40 dB | FLOPs |" in printed and math.isfinite(found["nearness"][0]["share"])
    monkeypatch.setattr("sys.argv", ["quality", "--from", str(path), "--plot", str(tmp_path / "again.svg")])
    quality.main()
    assert capsys.readouterr().out == printed and (tmp_path / "again.svg").exists()


def test_the_comparison_of_forecasters_has_one_configuration_per_schedule_and_forecaster():
    configs = [*quality_forecasters.configs(28, quality_forecasters.DEFAULT, "^(blocks|w3)")]
    assert len({(config.name, config.group) for config in configs}) == len(configs)
    groups = {config.group for config in configs}
    assert {"last", "FoCa", "HiCache", "FreqCa", "Spectrum"} <= groups and "Taylor 1 late" not in groups
    assert len(configs) == 6 * len(groups)
    [late] = quality_forecasters.configs(28, "^Taylor 1 late$", "^w3")
    assert late.forecaster is not None and made("cachedit_fx.forecasters", late) == LateTaylorSeer()


def test_the_comparison_of_forecasters_marks_the_best_of_each_schedule():
    rows = [row("x", 0.3, 30, "a"), row("x", 0.3, 36, "b"), row("y", 0.5, 50, "a"), row("y", 0.5, 44, "b")]
    quality_table, cost_table = quality_forecasters.tables({"rows": rows}).split("\n\n")
    assert quality_table.splitlines()[2:] == [
        "| FLOPs | 0.300 | 0.500 |",
        "| a | 30.0 | **50.0** |",
        "| b | **36.0** | 44.0 |",
    ]
    assert cost_table.splitlines()[2:] == ["| a | 0.450 | 0.400 | 0.350 |", "| b | - | 0.400 | ≤ 0.300 |"]
