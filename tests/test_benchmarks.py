"""The benchmarks run, check the decisions, and describe the machine. The measured figures are not tested."""

import json

import pytest
import torch

from benchmarks import run
from benchmarks.driver import Results
from benchmarks.figures import Figures, targets
from benchmarks.memory import gaps, running_peak
from benchmarks.sizes import ON_CPU, ON_GPU, WORKS
from benchmarks.variants import bytes_of
from benchmarks.work import schedule


def test_schedule_computes_the_warm_up_and_every_third_step_after_it():
    assert schedule(9, 3) == (1, 1, 1, 0, 0, 1, 0, 0, 1)


@pytest.mark.parametrize("name", [*ON_CPU, *ON_GPU])
def test_every_workload_reuses_at_least_half_of_its_steps(name):
    work = WORKS[name]
    assert work.mask[: work.warmup] == (1,) * work.warmup
    assert sum(work.mask) <= work.num_steps / 2
    assert len(work.text) == len(work.guidance_branches)


def test_streams_have_the_size_of_the_tensors_that_blocks_pass_on():
    assert WORKS["flux-dev"].stream_bytes("cond") == {
        "hidden_states": 4096 * 3072 * 2,
        "encoder_hidden_states": 512 * 3072 * 2,
    }
    assert WORKS["wan"].stream_bytes("uncond") == {"hidden_states": 192 * 256 * 4}


def test_running_peak_is_the_highest_level():
    assert running_peak([10, 5, -12, 6, -9]) == 15
    assert running_peak([-3]) == 0


def test_bytes_count_each_storage_once():
    tensor = torch.zeros(4, 4)
    assert bytes_of([{"a": tensor, "b": (tensor[1:], None)}, 3, [torch.zeros(2)]]) == 64 + 8


def test_gaps_separate_pauses_after_reads_from_other_pauses():
    busy = [(0.0, 10.0, "kernel"), (12.0, 13.0, "Memcpy DtoH (Device -> Pinned)"), (33.0, 43.0, "kernel")]
    assert gaps(busy) == {
        "reads": 1,
        "bubble_us": 20.0,
        "bubbles_share": 20 / 43,
        "other_pause_us": 2.0,
        "idle_share": 22 / 43,
    }


def test_gaps_do_not_count_pauses_that_another_stream_covers():
    assert gaps([(0.0, 10.0, "long"), (1.0, 2.0, "Memcpy DtoH"), (9.0, 11.0, "kernel")])["idle_share"] == 0


def _results(seconds: dict[str, list[list[float]]]) -> Results:
    results = Results(list(seconds))
    for name, rounds in seconds.items():
        results.variants[name]["rounds"] = [
            {"steps": [{"cpu": step_time} for step_time in step_times]} for step_times in rounds
        ]
    return results


def test_ratios_are_computed_within_a_round():
    work = WORKS["wan"].tiny()  # Computes 1, 1, 0, 0, 1, 0.
    slow, fast = [4.0, 4.0, 1.0, 1.0, 4.0, 1.0], [2.0, 2.0, 0.5, 0.5, 2.0, 0.5]
    results = _results({"plain": [[4.0] * 6, [2.0] * 6], "ours": [slow, fast], "floor": [[0.5] * 6, [0.25] * 6]})
    figures = Figures(work, results, "cpu")
    assert figures.step("ours", "plain", reused=False) == 1
    assert figures.step("ours", "floor", reused=True) == 2
    assert figures.step("plain", "floor", reused=True) is None
    assert figures.generation("ours", "plain") == 15 / 24
    assert targets(figures)["generation, same decisions / cache-dit"] is None


def test_variants_are_compared_through_the_plain_runs_beside_them():
    work = WORKS["wan"].tiny()
    results = _results({"plain": [[1.0] * 6], "ours": [[1.0] * 6], "fbc": [[3.0] * 6]})
    results.variants["ours"]["beside"] = results.variants["plain"]["rounds"]
    results.variants["fbc"]["beside"] = [{"steps": [{"cpu": 2.0}] * 6}]  # The machine had become slower.
    assert Figures(work, results, "cpu").generation("ours", "fbc") == 1 / 1.5


@pytest.mark.slow
def test_a_quick_run_checks_the_decisions_and_describes_itself(tmp_path, monkeypatch, capsys):
    command = ["benchmarks.run", "--quick", "--inner", "eager", "--work", "wan", "--rounds", "1"]
    command += ["--variants", "plain", "ours", "--no-warm", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", command)
    run.main()  # Each variant runs in a separate process.
    printed = capsys.readouterr().out

    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"] and "--quick" in written["command"]
    found = written["works"]["wan"]
    assert found["errors"] == {} and found["mask"] == [1, 1, 0, 0, 1, 0]
    ours = found["variants"]["ours"]
    (generation,) = ours["rounds"]
    assert generation["reused"] == {"cond": [2, 3, 5], "uncond": [2, 3, 5]}
    assert len(generation["steps"]) == 6 and all(step["cpu"] > 0 and step["wall"] > 0 for step in generation["steps"])
    # Per guidance branch the probe and one stream: 48 tokens of width 32 in float32.
    assert (generation["state_bytes"], generation["state_bytes_after"]) == (2 * 2 * 48 * 32 * 4, 0)
    assert ours["memory"]["peak"] > generation["state_bytes"]
    assert found["targets"]["computed step / plain"] > 0

    for expected in (written["hardware"], f"torch {torch.__version__}", written["command"], "110010", "| ours |"):
        assert expected in printed
