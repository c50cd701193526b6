"""The GPU benchmark: a dry run on a CPU, its counters and processes, and its GPU code with stubs for `torch.cuda`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import cudagraph_trees
from torch.autograd import DeviceType

from benchmarks import variants
from benchmarks import worker as timed
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, environment
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.counters import count_graph_use, count_host_waits
from benchmarks.gpu.gaps import STEP, Event, _event_of, covered, steps_of, summary
from benchmarks.gpu.page import as_html, as_markdown, notes_of
from benchmarks.gpu.plan import ENVIRONMENT_CHECKS, Run
from benchmarks.gpu.processes import Process, Task, ask, run_pool
from benchmarks.gpu.records import FAILED, PASSED, SKIPPED, Check, Results
from benchmarks.gpu.speed import ITEMS, Bench, Item, device_memory, processes_that_fit
from benchmarks.gpu.works import GPU_WORKS, weight_bytes
from benchmarks.variants import Settings
from cachedit_fx.runtime.step import StepRun

# A worker without torch: it repeats the last argument as a record, and then does what the command says.
SCRIPT = """
import json, sys, time
for line in sys.stdin:
    print(json.dumps({"record": json.loads(sys.argv[1])}), flush=True)
    if line.strip() == "hang": time.sleep(60)
    if line.strip() == "crash": sys.exit("bad end")
    print("no message")
    print(json.dumps({"answer": {"said": line.strip()}}), flush=True)
"""


def worker(folder: Path, name: str) -> Process:
    return Process(name, {"name": name}, folder / name, command=(sys.executable, "-c", SCRIPT))


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.is_timed = enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.is_timed and other.is_timed
        return 2.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stubs of `torch.cuda`, which compute on the CPU. A read of a tensor warns as a synchronization does."""
    mode: list[object] = [0]
    stubs: dict[str, Any] = dict(
        Event=FakeEvent,
        synchronize=lambda: None,
        get_sync_debug_mode=lambda: mode[0],
        set_sync_debug_mode=lambda new: mode.__setitem__(0, new),
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 1 << 20,
        max_memory_allocated=lambda: 3 << 20,
        mem_get_info=lambda: (130 << 30, 139 << 30),
        device_count=lambda: 1,
        get_device_name=lambda: "Fake GPU",
        get_device_properties=lambda _number: SimpleNamespace(total_memory=139 << 30),
    )
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    read = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        if mode[0] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return read(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs |= {"device": "cpu"} if kwargs.get("device") == "cuda" else {}
            return function(*("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

        return call

    made_by = ("build", "latents_of", "prompt_of", "timesteps_of")
    for module, name in [(m, n) for m in (checks, variants, timed) for n in made_by if hasattr(m, n)]:
        monkeypatch.setattr(module, name, on_cpu(getattr(module, name)))
    fake_torch = SimpleNamespace(**{**vars(torch), "ones": on_cpu(torch.ones), "linspace": on_cpu(torch.linspace)})
    monkeypatch.setattr(environment, "torch", fake_torch)


def verdicts(data: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(check["case"], check["name"]): check["verdict"] for check in data["checks"]}


# Whole runs


def test_a_run_on_a_stubbed_gpu_makes_every_check_and_measurement(fake_cuda: None, tmp_path: Path):
    arguments = "--device cuda --in-process --inner eager --tiny --static-waits 1 --rounds 1 --cases eager-flux-tiny"
    more = ["--items", "flux-dev-shallow", "--variants", "plain", "ours", "--out", str(tmp_path)]
    status = command.main([*arguments.split(), *more])
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = verdicts(data)
    assert {name for case, name in found if case == "environment"} == {*ENVIRONMENT_CHECKS}
    assert {name for case, name in found if case == "eager-flux-tiny"} == {*CHECKS}
    assert {key for key, verdict in found.items() if verdict != PASSED} == {("environment", "several devices")}, data
    assert (status, data["state"]) == (0, "finished")
    assert [item["note"] for item in data["items"]] == ["", "", ""]
    (work,) = data["speed"]
    assert work["errors"] == {} and {*work["variants"]} == {"plain", "ours"}
    ours = work["figures"]["ours"]
    assert ours["computed_ms"] == ours["reused_ms"] == 2.0 and ours["peak_bytes"] == 3 << 20
    assert work["variants"]["ours"]["rounds"][0]["reused"] == {"cond": [2, 3, 5]}
    for page in ("page.html", "page.md"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert "No check failed" in text and "Fake GPU" in text and GPU_WORKS["flux-dev-shallow"].tiny().title in text


def test_a_wrong_residual_fails_a_check_that_the_page_shows_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = StepRun.reusable
    monkeypatch.setattr(StepRun, "reusable", lambda *args: tuple(None if t is None else 1.5 * t for t in right(*args)))
    arguments = ["--device", "cpu", "--tiny", "--cases", "eager-flux-tiny", "--items", "--static-waits", "1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1
    found = verdicts(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    failed = {name for (_, name), verdict in found.items() if verdict == FAILED}
    assert failed == {"reuse", "generations in a row", "interleaved requests", "kept outputs"}
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"4 of {len(found)} checks failed" in html
    assert html.index("Checks that failed") < html.index("bitwise equality") < html.index("Checks that passed")


@pytest.mark.parametrize("end", ["SIGTERM", "time", "error"])
def test_an_interrupted_run_leaves_what_it_has(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(self: Run) -> None:
        self._results.add_check(Check("eager-flux-tiny", "reuse", "equal", "equal"))
        if end == "error":
            raise ValueError("planted")
        if end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(Run, "run", run)
    monkeypatch.setattr(command, "RESERVE", 0.2)
    handler = signal.getsignal(signal.SIGTERM)
    minutes = "0.01" if end == "time" else "5"
    arguments = ["--device", "cpu", "--minutes", minutes, "--cases", "eager-flux-tiny", "--out", str(tmp_path)]
    if end == "error":
        with pytest.raises(ValueError, match="planted"):
            command.main(arguments)
    else:
        assert command.main(arguments) == 2
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = verdicts(data)
    assert len(found) == len(CHECKS) + len(ENVIRONMENT_CHECKS)
    assert found.pop(("eager-flux-tiny", "reuse")) == PASSED and {*found.values()} == {SKIPPED}
    assert (
        data["state"] == "interrupted: " + dict(SIGTERM=end, time="the time is over", error="ValueError: planted")[end]
    )
    assert "The run is not complete" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_every_case_and_item_has_a_model_that_fits_into_one_device(fake_cuda: None):
    assert all(case.find_work().num_steps > 5 for case in CASES.values())
    assert all(item.work in GPU_WORKS and item.variants[0] == "plain" for item in ITEMS.values())
    total = device_memory("cuda")
    shallow = GPU_WORKS["qwen-image-shallow"]
    assert processes_that_fit(shallow, total) >= 5
    assert weight_bytes(shallow) == pytest.approx(2 * 1.4e9, rel=0.1)  # 4 of 60 blocks of 20 billion weights, bfloat16.


# Processes


def test_workers_that_hang_or_crash_do_not_affect_the_others(tmp_path: Path):
    commands = dict(good="go", bad="crash", stuck="hang", after="go", late="go")
    tasks = [
        Task(name, lambda name=name: worker(tmp_path, name), what, 999 if name == "late" else 0.1, 2.0)
        for name, what in commands.items()
    ]
    records, ended = [], {}
    left_out = run_pool(
        tasks,
        2,
        time.monotonic() + 60,
        time.monotonic() + 60,
        lambda name, record: records.append((name, record["name"])),
        lambda task, message, seconds: ended.__setitem__(task.name, message),
    )
    assert [task.name for task in left_out] == ["late"]
    assert ended["good"] == ended["after"] == {"answer": {"said": "go"}}
    assert ended["bad"] == {"error": "the worker ended with code 1: bad end"}
    assert ended["stuck"] == {"error": "no end after 2 s; the worker was killed", "is_out_of_time": False}
    assert sorted(records) == [(name, name) for name in ("after", "bad", "good", "stuck")]


def test_workers_that_are_asked_together_have_one_deadline(tmp_path: Path):
    one, other = worker(tmp_path, "one"), worker(tmp_path, "other")
    assert ask([one], "go", time.monotonic() + 30) == {"one": {"answer": {"said": "go"}}}
    found = ask([one, other], "hang", time.monotonic() + 0.5)
    late = {"error": "no answer to 'hang' in the time that it had"}
    assert found == {"one": late, "other": late}
    assert "ended" in ask([one], "go", time.monotonic() + 30)["one"]["error"]


class Canned:
    """A worker that gives the same answers as a real one, at once; the errors are those of the test."""

    def __init__(self, name: str, errors: dict[tuple[str, str], str]) -> None:
        self.name, self.errors, self.is_killed = name, errors, False

    def send(self, command: str, messages: Any) -> None:
        error = self.errors.get((self.name, command), "killed" if self.is_killed else "")
        steps = [{"gpu": 0.004 if self.name == "plain" else 0.003}] * 6
        gaps = {"computed": {"busy_us": 3000.0, "idle_us": 3000.0}, "reused": {"busy_us": 1500.0, "idle_share": 0.75}}
        answers: dict[str, Any] = dict(
            compile={"wall": 9.0}, generation={"steps": steps}, memory={"in_all": 5, "peak": 2}, gaps=gaps
        )
        messages.put((self.name, {"error": error} if error else {"answer": answers[command]}))

    def kill(self) -> None:
        self.is_killed = True


def bench(path: Path, errors: dict[tuple[str, str], str], together: int = 9) -> tuple[Bench, list[Canned]]:
    results = Results(dict(command="c", hardware="h", versions={}, began="now"), path / "results.json")
    made: list[Canned] = []

    def start(settings: Settings) -> Canned:
        made.append(Canned(settings.variant, errors))
        return made[-1]

    item = Item("flux-dev-shallow", variants=("plain", "ours", "floor", "fbc"))
    measured = Bench(item, Settings("flux-dev-shallow", "plain", "cuda", True), start, results, together)
    measured.run(time.monotonic() + 30)
    as_html(results.data), as_markdown(results.data)
    return measured, made


def test_the_idle_time_is_that_of_steps_without_a_profiler(tmp_path: Path):
    found, made = bench(tmp_path, {}, together=2)
    ours = found.entry["figures"]["ours"]
    assert (ours["computed_ms"], ours["computed_to_plain"]) == (3.0, 0.75)
    assert (ours["idle_computed"], ours["idle_reused"], ours["idle_reused_profiled"]) == (0.0, 0.5, 0.75)
    assert found.entry["figures"]["plain"]["reused_ms"] is None
    assert all(worker.is_killed for worker in made) and len(made) == 4
    assert [len(found.measured.variants[name]["rounds"]) for name in ("plain", "ours", "fbc")] == [6, 2, 2]


def test_a_variant_that_fails_does_not_affect_the_others(tmp_path: Path):
    out_of_memory = "OutOfMemoryError: CUDA out of memory"
    errors = {("plain", "compile"): out_of_memory, ("fbc", "generation"): "RuntimeError: other steps"}
    found, _ = bench(tmp_path, errors | {("floor", "gaps"): "RuntimeError: no profile"})
    assert found.entry["errors"] == {
        "plain": f"compile: {out_of_memory}",
        "fbc": "generation: RuntimeError: other steps",
    }
    assert found.entry["failed"] == {"floor": "gaps: RuntimeError: no profile"}
    ours, floor = (found.entry["figures"][name] for name in ("ours", "floor"))
    assert ours["generation_ms"] == 18.0 and ours["generation_to_plain"] is None and floor["reused_ms"] == 3.0
    assert any(out_of_memory in note for note in notes_of(found.entry))


# Counters


def test_waits_of_the_host_are_counted(fake_cuda: None):
    value = torch.arange(3.0)
    with count_host_waits("cpu") as reads:
        value.sum().item(), value.tolist(), bool(value[0])
    assert reads.count == 3
    with count_host_waits("cuda") as waits:
        value.tolist()
        torch.cuda.synchronize()
        torch.cuda.Event().synchronize()
    assert waits.count == 3 and torch.cuda.get_sync_debug_mode() == 0
    value.tolist(), torch.cuda.synchronize()
    assert waits.count == 3 and reads.count == 3


def test_recordings_and_copies_of_cuda_graphs_are_counted(monkeypatch: pytest.MonkeyPatch):
    copied = []

    class Node:
        def __init__(self, name: str) -> None:
            self.non_static_input_idx = [0, 1, 2]

        def _copy_inputs_and_remove_from_src(self, dsts: Any, srcs: Any) -> None:
            copied.append(len(srcs))

    monkeypatch.setattr(cudagraph_trees, "CUDAGraphNode", Node)
    weight, other = torch.zeros(4), torch.zeros(2)
    with count_graph_use([weight]) as use:
        Node("first")._copy_inputs_and_remove_from_src(None, [weight, other, 7])
    Node("second")
    assert (use.is_known, use.recorded, use.replayed) == (True, 1, 1)
    assert (use.copied, use.copied_bytes, use.copied_weights) == (2, 24, 1)
    assert copied == [3]


def test_the_cuda_graphs_of_this_torch_have_the_names_that_are_counted():
    with count_graph_use() as use:
        pass
    assert use.is_known and hasattr(cudagraph_trees.CUDAGraphNode, "__init__")


def test_the_idle_time_of_a_step_is_that_between_the_kernels_it_launched():
    events = [
        Event(f"{STEP}0", 0, 10, False),
        Event(f"{STEP}1", 10, 30, False),
        Event("cudaLaunchKernel", 1, 2, False, 1),
        Event("cudaGraphLaunch", 11, 12, False, 2),
        Event("cudaMemcpyAsync", 13, 14, False, 3),
        Event("cudaStreamSynchronize", 14, 29, False, 4),
        Event("cudaLaunchKernel", 40, 41, False, 5),  # After the last step.
        Event("gemm", 5, 15, True, 1),
        Event("gemm", 20, 24, True, 2),
        Event("norm", 22, 26, True, 2),
        Event("Memcpy DtoH (Device -> Pinned)", 27, 28, True, 3),
        Event(f"{STEP}1", 5, 99, True, 2, is_annotation=True),
        Event("late", 50, 60, True, 5),
    ]
    first, second = steps_of(events)
    assert first == {"waits": 0, "busy_us": 10, "idle_us": 0, "kernels": 1, "reads": 0}
    assert second == {"waits": 1, "busy_us": 7, "idle_us": 6, "kernels": 3, "reads": 1}  # From 15 to 28.
    found = summary([first, second, second], [1, 0, 1])
    assert found["reused"]["idle_share"] == 6 / 13 and found["computed"]["waits"] == 1
    assert covered([(0, 4), (2, 3), (5, 6)]) == 5


def test_events_of_the_profiler_are_converted():
    def raw(name: str, device: DeviceType) -> Any:
        numbers = dict(start_ns=2000, duration_ns=3000, correlation_id=7)
        return SimpleNamespace(
            name=lambda: name, device_type=lambda: device, **{key: (lambda v=v: v) for key, v in numbers.items()}
        )

    assert _event_of(raw("gemm", DeviceType.CUDA)) == Event("gemm", 2, 5, True, 7)
    assert _event_of(raw("gpu_user_annotation", DeviceType.CUDA)).is_annotation
    assert not _event_of(raw("aten::mm", DeviceType.CPU)).is_on_device


# Pages


def test_pages_escape_what_they_show(tmp_path: Path):
    about = dict(command="c", hardware="h", versions={"torch": "2"}, began="now")
    results = Results(about, tmp_path / "results.json")
    results.add_check(Check("case", "name", "a | b", "<script>", FAILED, "line\nline"))
    results.finish("finished")
    assert "<script>&" not in as_html(results.data) and "&lt;script&gt;" in as_html(results.data)
    assert "| <script>: line line |" in as_markdown(results.data)
    assert results.has_failed
