"""The benchmarks run, check the decisions, and describe the machine. The measured figures are not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.driver import ROOT, Process, Results
from benchmarks.figures import Figures, targets
from benchmarks.memory import gaps, running_peak
from benchmarks.pipeline_figures import summarize
from benchmarks.pipeline_tables import BEGIN, END, MEASURED, performance, put, readme
from benchmarks.pipeline_variants import DiffusersCache, FirstBlockCache
from benchmarks.pipeline_worker import PipelineWorker
from benchmarks.sizes import ON_CPU, ON_GPU, WORKS
from benchmarks.variants import Settings, bytes_of
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


# Pipelines.


def test_every_transformer_of_a_pipeline_begins_with_its_own_warm_up():
    work = WORKS["wan"]
    assert work.steps == (range(7), range(7, 14))
    assert work.mask == (1, 1, 0, 0, 1, 0, 0) * 2


def _round(steps: list[float], reference: list[float]) -> dict:
    def times(seconds: list[float]) -> dict:
        return {"cpu": sum(seconds), "wall": sum(seconds), "steps": [{"cpu": each} for each in seconds]}

    return {**times(steps), "reference": times(reference), "rounding": 1e-7}


def _measured() -> dict:
    """A summary of made-up times of two rounds; the machine is half as fast in the second one."""
    work = WORKS["qwen"].tiny()  # Computes 1, 1, 0, 0, 1, 0.
    plain, floor, ours, peer = [4.0] * 6, [9.0, 4, 1, 1, 4, 1], [9.0, 5, 2, 2, 5, 2], [9.0, 6, 3, 3, 6, 3]
    results = Results(["plain", "ours", "fbc"])
    for name, steps in (("plain", plain), ("ours", ours), ("fbc", peer)):
        rounds = [_round([slow * s for s in steps], [slow * s for s in floor]) for slow in (1, 2)]
        results.variants[name] |= {"rounds": rounds, "compile": [{"cpu": 8.0, "graphs": 1}]}
    return summarize(work, results)


def test_steps_are_compared_with_the_reference_of_the_same_round():
    rows = _measured()["rows"]
    assert rows["ours"]["computed_ratio"] == [5 / 4] * 3
    assert rows["ours"]["reused_ratio"] == [2.0] * 3
    assert rows["plain"]["computed_ratio"] == [1.0] * 3 and "reused_ratio" not in rows["plain"]
    assert rows["floor"]["reused_ms"] == 1500  # The median of 1 and 2 s, and not the ratio, follows the machine.


def test_targets_compare_generations_with_the_best_peer():
    found = {target["name"]: (target["measured"][0], target["met"]) for target in _measured()["targets"]}
    assert found == {
        "reused step / floor": (2.0, False),
        "computed step / plain": (1.25, False),
        "generation / best peer (fbc)": (0.8333, True),
    }


def test_tables_are_put_between_the_markers():
    measured = dict(hardware="a CPU", versions={}, fn=1, bn=0, policy="dynamic", inner="eager", rounds=2, command="x")
    measured["works"] = {"qwen": _measured()}
    page = put(f"before\n{BEGIN}\nold\n{END}\nafter", readme(measured))
    assert page.startswith(f"before\n{BEGIN}\n\nMeasured on a CPU: a CPU") and page.endswith(f"\n\n{END}\nafter")
    assert "| pipeline | cachedit_fx | FirstBlockCache |" in page and "old" not in page
    assert f"| {measured['works']['qwen']['title']} | 1.042 | 1.250 |" in page
    assert "| ours: generation / best peer | 0.833 |" in performance(measured)
    assert "| reused step / floor | 1.05 | 2.000 (2.000 to 2.000) | missed |" in performance(measured)


@pytest.mark.parametrize(("name", "tables"), [("README.md", readme), ("docs/performance.md", performance)])
def test_the_tables_of_the_pages_are_those_of_the_last_run(name, tables):
    """`python -m benchmarks.pipeline_tables` writes them again."""
    page = (ROOT / name).read_text(encoding="utf-8")
    assert put(page, tables(json.loads(MEASURED.read_text(encoding="utf-8")))) == page


def _process(settings: Settings, cache: Path, module: str) -> Any:
    """A worker in a process for plain, which tests the commands; a worker in this process for the others."""
    return Process(settings, cache, module=module) if settings.variant == "plain" else InThisProcess(settings)


class InThisProcess:
    def __init__(self, settings: Settings) -> None:
        self.worker = PipelineWorker(settings)

    def ask(self, command: str) -> Any:
        return json.loads(json.dumps(getattr(self.worker, command)()))

    def quit(self) -> None:
        pass


@pytest.mark.slow
def test_a_quick_run_checks_the_decisions_and_describes_itself(tmp_path, monkeypatch, capsys):
    command = ["benchmarks.run", "--quick", "--inner", "eager", "--work", "wan", "--rounds", "1", "--profile"]
    command += ["--variants", "plain", "ours", "--no-warm", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("benchmarks.pipeline_driver.Process", _process)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run.main()
    printed = capsys.readouterr().out

    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    summary = written["summary"]
    assert summary["versions"]["torch"] == torch.__version__ and "--quick" in summary["command"]
    found = summary["works"]["wan"]
    assert found["errors"] == {} and found["mask"] == "110110"
    ours = found["rows"]["ours"]
    (generation,) = written["works"]["wan"]["variants"]["ours"]["rounds"]
    assert generation["reused"] == {"transformer": [[2], [2]], "transformer_2": [[2], [2]]}
    assert len(generation["steps"]) == len(generation["reference"]["steps"]) == 6
    # Per transformer and guidance branch the probe and one stream: 48 tokens of width 32 in float32.
    assert (ours["state_bytes"], ours["state_bytes_after"]) == (2 * 2 * 2 * 48 * 32 * 4, 0)
    assert ours["fast_calls"] == ours["calls"] == 12
    assert 1e-5 < ours["difference_from_plain"] < 1 and ours["difference_from_ours"] == 0
    assert found["rows"]["plain"]["rounding"] == ours["rounding"] == 0
    assert found["profile"]["reused"]["pieces: tail"] > 0 and "all guards" in found["profile"]["computed"]
    for expected in (summary["hardware"], f"torch {torch.__version__}", summary["command"], "110110", "| ours |"):
        assert expected in printed


def test_a_variant_that_reuses_other_steps_is_an_error(monkeypatch):
    monkeypatch.setattr(FirstBlockCache, "before_step", DiffusersCache.before_step)  # It decides for itself.
    monkeypatch.setattr(FirstBlockCache, "_compile", lambda self: None)
    worker = PipelineWorker(Settings("flux-compute", "fbc", is_tiny=True, inner="eager"))
    with pytest.raises(RuntimeError, match=r"reused steps .* wanted"):
        worker.compile()
