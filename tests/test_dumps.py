"""`debug_dir` gets files of every pass, a report and a script that repeats the passes; torch logs a line per graph."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachedit_fx
from cachedit_fx import Backend, CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.reproduce import explain_saved, run_saved
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from tests import hybrid, tiny
from tests.zoo import VARIANTS

FIELDS = dict(Fn_compute_blocks=1, inner_backend="eager")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def compile_once(model: nn.Module, folder: Path, call: dict[str, Any], **fields: Any) -> Any:
    config = CacheConfig(**FIELDS | {"debug_dir": str(folder)} | fields)
    return torch.compile(model, backend=Backend(config))(**call)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_graph_gets_a_folder_with_two_files_per_pass(tmp_path):
    compile_once(hybrid.build(), tmp_path / "new" / "folder", hybrid.calls()[0])
    (graph,) = (tmp_path / "new" / "folder").iterdir()
    assert graph.name == "000_Hybrid"
    passes = [
        *(
            "inline-checkpoints",
            "apply-functor",
            "drop-numpy-calls",
            "hoist-symbols",
            "narrow-contexts",
            "functionalize-writes",
        ),
        *("insert-conditionals", "split-pieces"),
    ]
    found = names(graph)
    numbers = {name: [f for f in found if f"_{name}." in f] for name in passes}
    for name, files in numbers.items():
        assert [file.split(".", 1)[1] for file in files] == ["after.py", "before.py"], name
    order = [files[0][:2] for files in numbers.values()]
    assert order == sorted(order)
    assert {"00_captured.py", "report.json", "graph.json", "reproduce.py"} <= set(found)
    assert any("locate-blocks.json" in name for name in found) and any("cut-regions.json" in name for name in found)
    after = next(graph.glob("*_insert-conditionals.after.py")).read_text()
    before = next(graph.glob("*_insert-conditionals.before.py")).read_text()
    assert "step.decide(0" in after and "decide" not in before
    assert next(graph.glob("*_split-pieces.before.py")).read_text() == after


def test_the_report_equals_that_of_explain(tmp_path):
    model = hybrid.build()
    compile_once(model, tmp_path, hybrid.calls()[0])
    report = json.loads(next(tmp_path.glob("*/report.json")).read_text())
    (graph,) = cachedit_fx.explain(model, cache_config=CacheConfig(**FIELDS), **hybrid.calls()[0]).to_dict()["graphs"]
    changing = {"risks", "cls", "module"}  # Guards are created later.
    found, expected = (json.dumps({k: v for k, v in of.items() if k not in changing}) for of in (report, graph))
    # `explain` traces blocks that are alike once; a node of a repeated block may have another number in its name.
    assert re.sub(r"(?<=[a-z])_\d+", "_n", found) == re.sub(r"(?<=[a-z])_\d+", "_n", expected)


@pytest.mark.slow
def test_the_script_repeats_the_passes_without_the_model(tmp_path):
    variant = VARIANTS["HunyuanDiT"]  # Its operators are installed wherever diffusers is.
    compile_once(variant.build(), tmp_path, variant.inputs())
    script = next(tmp_path.glob("*/reproduce.py"))
    ran = subprocess.run([sys.executable, str(script), "--run"], capture_output=True, text=True, check=True)
    assert "blocks: 8 blocks, pattern 2" in ran.stdout
    assert "warmup, threshold-one, max-continuous; computed steps equal the captured graph bit for bit" in ran.stdout


@pytest.mark.parametrize("name", ["HunyuanDiT", "FluxControlNet"])  # One with long skips, one with NumPy functions.
def test_a_saved_graph_gives_the_same_plan_and_runs(name, tmp_path):
    variant = VARIANTS[name]
    compile_once(variant.build(), tmp_path, variant.inputs())
    (folder,) = tmp_path.iterdir()
    report = json.loads((folder / "report.json").read_text())  # The report of `explain` for the model, as above.
    (saved,) = json.loads(json.dumps(explain_saved(folder).to_dict()))["graphs"]
    for part in ("lists", "regions", "pieces"):
        assert saved[part] == report[part] and saved[part], part
    assert [stats.decisions for stats in run_saved(folder)] == [["warmup", "threshold-one", "max-continuous"]]


def test_a_saved_graph_with_dynamic_sizes_is_loaded_with_static_sizes(tmp_path):
    config = CacheConfig(**FIELDS, debug_dir=tmp_path)
    torch.compile(hybrid.build(), backend=Backend(config), dynamic=True)(**hybrid.calls()[0])
    (folder,) = tmp_path.iterdir()
    (graph,) = explain_saved(folder).graphs
    assert graph.is_cached and all(size.isdigit() for value in graph.arguments for size in value.shape)


def test_a_graph_that_does_not_match_is_also_written(tmp_path):
    compile_once(hybrid.build(hybrid.LosesText), tmp_path, hybrid.calls()[0])
    (folder,) = tmp_path.iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert (report["is_cached"], report["verdicts"][0]["cause"]) == (False, "stream-count")
    assert not explain_saved(folder).is_cached
    with pytest.raises(ValueError, match=r"this graph is not cached.*\n +stream-count"):
        run_saved(folder)


def test_a_failing_pass_leaves_the_earlier_files_and_the_error(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("no way")

    monkeypatch.setattr(InsertConditionals, "call", fail)
    plain = tiny.build()
    call = hybrid.calls()[0]
    torch.testing.assert_close(compile_once(tiny.build(), tmp_path, call), plain(**call), rtol=0, atol=0)
    (folder,) = tmp_path.iterdir()
    assert "ZeroDivisionError: no way" in (folder / "error.txt").read_text()
    assert any("cut-regions.json" in name for name in names(folder))


def test_an_invalid_folder_raises_an_error():
    with pytest.raises(ConfigError, match="debug_dir must be the path of a folder, or None, got 3"):
        CacheConfig(debug_dir=3)


SCRIPT = """
import torch
from tests import hybrid
with torch.no_grad():
    torch.compile(hybrid.build(), backend="cachedit", options={"Fn_compute_blocks": 1, "inner_backend": "eager"})(
        **hybrid.calls()[0])
"""


@pytest.mark.slow
def test_torch_logs_show_a_line_per_graph_and_tlparse_gets_the_graphs(tmp_path):
    environment = {**os.environ, "TORCH_LOGS": "+cachedit_fx", "TORCH_TRACE": str(tmp_path)}
    root = str(Path(__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    lines = ran.stderr.splitlines()
    assert len([line for line in lines if re.search(r"\bI\d{4}.*cached: blocks", line)]) == 1
    assert any(re.search(r"\bV\d{4}.* matches single_blocks", line) for line in lines)
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("cachedit_fx_plan", "cachedit_fx_cached_graph"):
        assert f'"name": "{name}"' in trace
