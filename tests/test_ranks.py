"""Two processes that run the same blocks together decide alike, whatever happens on one of them.

All tests read the results of one run of `tests.ranks` with two processes. If it does not end in time, it is ended, and
the tests fail.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_structure import imports, modules

SECONDS = 240  # The run takes about 15 seconds of two cores; machines may be busy.
CHECKS = (
    *("apart", "new_session", "bound", "weights", "replaced", "number", "prompt", "mask", "disabled", "shadow"),
    *("decider", "costs", "data_parallel", "tensor_parallel", "sharded", "two_groups", "pipelines", "end"),
)
REUSED = ("diff-below", "decider-reuse")
pytestmark = pytest.mark.xdist_group("ranks")  # One worker, so that the processes are started once.
Results = Callable[[str], list[Any]]


def start(folder: Path, names: tuple[str, ...]) -> str:
    """Runs the checks in two processes. Returns what they printed.

    Raises:
        TimeoutExpired: They have not ended in time, and were ended.
    """
    command = [sys.executable, "-m", "tests.ranks", str(folder), *names]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """NAME -> what `check_NAME` returned on rank 0 and on rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    printed = start(folder, CHECKS)

    def results_of(name: str) -> list[Any]:
        files = [folder / f"{name}.{rank}" for rank in range(1 if name == "end" else 2)]
        assert all(file.exists() for file in files), f"{name} has not ended on all ranks: {printed[-3000:]}"
        return [torch.load(file) for file in files]

    return results_of


def reused(reasons: list[str]) -> list[int]:
    return [step for step, reason in enumerate(reasons) if reason in REUSED]


def test_ranks_whose_parts_change_differently_decide_by_the_diff_of_the_whole(results: Results):
    first, second = results("apart")
    threshold = first["threshold"] * 1.01
    assert first["local"] < threshold < second["local"]  # Each rank alone would decide otherwise.
    assert first["reasons"] == second["reasons"] == first["alone"]
    assert first["diffs"] == second["diffs"]
    assert first["diffs"][2] == pytest.approx(first["threshold"], rel=1e-5)  # Summed in another order.
    assert first["error"] < 1e-6 and second["error"] < 1e-6
    assert set(range(8)) - {*first["equal"]} == {*reused(first["reasons"])}


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        pytest.param("new_session", [0, 1, 4, 5], id="a-session-that-is-new-on-one-rank"),
        pytest.param("weights", [0, 1, 4], id="weights-written-on-one-rank"),
        pytest.param("replaced", [0, 1, 4], id="a-block-replaced-on-one-rank"),
        pytest.param("prompt", [0, 1, 4, 5], id="a-prompt-written-in-place-on-one-rank"),
        pytest.param("mask", [0, 1, 6], id="a-mask-on-one-rank"),
        pytest.param("disabled", [0, 1, 4, 5, 6, 7], id="the-cache-disabled-on-one-rank"),
        pytest.param("tensor_parallel", [0, 1, 4, 5], id="a-new-session-on-one-rank-with-tensor-parallelism"),
    ],
)
def test_a_step_that_one_rank_has_to_compute_is_computed_on_all(results: Results, name: str, computed: list[int]):
    first, second = results(name)
    assert first["equal"] == second["equal"] == computed
    assert "ranks-differ" in first["reasons"]


def test_cached_values_dropped_on_one_rank_leave_the_ranks_in_step(results: Results):
    first, second = results("bound")
    assert first["equal"] == second["equal"]
    assert 0 in first["equal"] and 1 in first["equal"]


def test_a_cache_that_was_disabled_can_be_enabled_again(results: Results):
    for found in results("disabled"):
        assert found["again"] == ["warmup", "warmup", "diff-below", "diff-below"]


def test_shadow_mode_runs_no_step_twice_on_one_rank_alone(results: Results):
    for found in results("shadow"):
        assert found["equal"] == [*range(8)]


def test_a_step_is_computed_if_the_decider_of_any_rank_says_so(results: Results):
    first, second = results("decider")
    assert first["equal"] == second["equal"] == [0, 1, 3, 5, 7]
    assert first["reasons"][3] == "ranks-differ" and second["reasons"][3] == "decider-compute"


def test_a_decider_that_raises_on_one_rank_ends_the_call_on_all(results: Results):
    first, second = results("decider")
    assert second["error"] == "ArithmeticError: the decider fails"
    assert first["error"].startswith("RuntimeError: cachedit_fx: this call ends because the decider raised an error")
    assert first["steps_before_the_error"] == second["steps_before_the_error"] == 4


def test_a_step_costs_one_collective_and_one_read_more(results: Results):
    for found in results("costs"):
        assert found["plain"] == {"reads": 0, "all_gather_into_tensor": 5}  # Four blocks, and the output.
        assert found["computed"] == {"reads": 1, "all_gather_into_tensor": 6}
        assert found["reused"] == {"reads": 1, "all_gather_into_tensor": 3}  # The first block, and the output.


def test_ranks_with_requests_of_their_own_exchange_nothing(results: Results):
    first, second = results("data_parallel")
    for found in (first, second):
        assert {*found["counts"]} == {"reads"}
    assert reused(first["reasons"]) == [] and first["equal"] == [*range(6)]
    assert second["reasons"] == ["warmup"] * 2 + ["threshold-one"] * 6 and second["equal"] == [0, 1]


def test_a_model_sharded_as_a_whole_is_cached_and_one_sharded_by_blocks_says_why_not(results: Results):
    for found in results("sharded"):
        assert found["whole"]["equal"] == [0, 1, 7] and len(reused(found["whole"]["reasons"])) == 5
        assert found["blocks"]["equal"] == [*range(8)] and found["blocks"]["reasons"] == []
        assert found["text"].count("fully_shard was applied to its layers") == 2  # Bare and enabled.


def test_an_exchange_over_two_groups_compares_all_ranks(results: Results):
    for found in results("two_groups"):
        diff = 1.2  # The larger one of (1 + 2) / (4 + 4) and (3 + 3) / (2 + 3).
        assert found["same"] == found["changed"] == pytest.approx([diff, 1.0, 0.0])
        for name in ("state", "time", "checksum", "no_number"):
            assert found[name] == pytest.approx([diff, 0.0, 0.0]), name
        assert found["asks"] == pytest.approx([diff, 0.0, 1.0])


def test_a_rank_whose_process_ends_ends_the_call_of_the_others(results: Results):
    (found,) = results("end")
    assert "RuntimeError" in found["error"] and found["seconds"] < 10


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_a_transformer_under_ulysses_decides_as_in_one_process(results: Results, name: str):
    for found in results("pipelines"):
        one = found[name]
        assert one["reasons"] == one["alone"]
        assert reused(one["reasons"]) and one["error"] < 1e-5  # Attention sums in another order.
        assert one["equal"] == one["computed"]


def test_a_guard_that_fails_on_one_rank_runs_no_collective_twice(results: Results):
    for found in results("number"):
        assert found["equal"] == [0, 1, 4, 5]


def test_the_package_imports_nothing_of_torch_distributed():
    found = {name: [*imports(file)] for name, file in modules().items()}
    assert len(found) > 120
    assert [name for name, names in found.items() if any(one.startswith("torch.distributed") for one in names)] == []
