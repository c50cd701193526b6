"""What one process has compiled, another one uses without a trace by Dynamo; what does not fit, it compiles."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx.frontend import backend
from cachedit_fx.frontend.enabled import enabled_of
from cachedit_fx.frontend.torch_internals import inductor_cache_folder
from tests import tiny


def enabled(model: Any = None, **others: Any) -> Any:
    model = tiny.build() if model is None else model
    return cachedit_fx.enable_cache(model, **(tiny.fields(inner_backend="eager") | others))


def run(model: Any, **sizes: Any) -> list[Tensor]:
    with torch.no_grad():
        return tiny.generate(model, tiny.prompt(), tiny.latents(**sizes))


@pytest.fixture
def num_captured() -> Iterator[Callable[[], int]]:
    """The number of graphs that Dynamo has passed to the backend."""
    with patch.object(backend, "copy_graph", side_effect=backend.copy_graph) as copied:
        yield lambda: copied.call_count


def saved(path: Path, model: Any = None, **others: Any) -> list[Tensor]:
    """Writes the file; returns the outputs."""
    model = enabled(model, **others)
    outputs = run(model)
    cachedit_fx.save_compiled(model, path)
    torch._dynamo.reset()
    return outputs


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "file"
    saved(path)
    return path


@pytest.fixture
def file(saved_once, tmp_path) -> Path:
    """A copy of the file with the graphs of `tiny.build()`."""
    return Path(shutil.copy(saved_once, tmp_path))


def decisions(model: Any) -> list[list[int]]:
    return [entry.cached_steps for entry in cachedit_fx.summary(model, logging=False)]


def test_a_loaded_graph_serves_without_a_trace_and_gives_the_same_outputs(file, num_captured):
    model, plain = enabled(), enabled()
    assert cachedit_fx.load_compiled(model, file)
    outputs = run(model)
    assert num_captured() == 0 and cachedit_fx.is_cached(model)
    tiny.assert_bitwise(outputs, run(plain))
    assert num_captured() == 1
    assert decisions(model) == decisions(plain) and decisions(model)[0]


def test_a_loaded_graph_uses_the_weights_of_its_process_and_follows_their_changes(file, num_captured):
    model, plain = enabled(tiny.build(seed=5)), enabled(tiny.build(seed=5))
    cachedit_fx.load_compiled(model, file)
    for _ in range(2):
        outputs = run(model)
        assert num_captured() == 0
        with patch.object(backend, "copy_graph", backend.copy_graph.side_effect):
            tiny.assert_bitwise(outputs, run(plain))
        for one in (model, plain):
            with torch.no_grad():
                one.blocks[1].image.weight.mul_(2)


def test_a_call_of_another_size_is_compiled(file, num_captured):
    model, plain = enabled(), enabled()
    cachedit_fx.load_compiled(model, file)
    run(model)
    assert num_captured() == 0
    tiny.assert_bitwise(run(model, tokens=9), run(plain, tokens=9))
    assert num_captured() >= 1


def replaced_block() -> Any:
    def forward(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> Any:
        hidden_states = hidden_states + 2 * scale * self.image(hidden_states).tanh()
        return hidden_states, encoder_hidden_states + scale * self.text(encoder_hidden_states).tanh()

    return patch.object(tiny.Block, "forward", forward)


def other_threads() -> Any:
    torch.set_num_threads(2)
    return patch.object(torch, "unused", None, create=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: replaced_block(), "the code of tests.tiny.Block.forward has changed"),
        (lambda: patch.object(torch, "tanh", torch.sin), ""),
        (lambda: other_threads(), "num_threads=2; saved: num_threads=1"),
    ],
    ids=["code", "unrelated", "global-state"],
)
def test_a_graph_that_does_not_fit_is_not_used(file, num_captured, caplog, change, says):
    model = enabled()
    assert cachedit_fx.load_compiled(model, file)
    try:
        with change(), caplog.at_level(logging.WARNING):
            run(model)
    finally:
        torch.set_num_threads(1)
    if says:
        (text,) = [record.getMessage() for record in caplog.records]
        assert text.startswith("cachedit_fx: the saved graphs of this Transformer are not used, so it is compiled.\n")
        assert says in text
    assert num_captured() == bool(says)


class Scaled(tiny.Transformer):
    """A transformer that reads a number, which is a constant in its graph."""

    factor = 1.0

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return super().forward(hidden_states * self.factor, encoder_hidden_states, timestep)


def test_a_number_that_the_graph_was_traced_with_must_be_the_same(tmp_path, num_captured, caplog):
    one, other = tiny.frozen(Scaled()), tiny.frozen(Scaled())
    one.factor = 1.0
    saved(tmp_path / "file", one)
    known = num_captured()
    other.load_state_dict(one.state_dict())
    other.factor = 2.0
    model = enabled(other)
    cachedit_fx.load_compiled(model, tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        found = run(model)
    assert num_captured() == known + 1
    assert "a value differs: L['self'].factor == 2.0; saved: " in caplog.text
    torch._dynamo.reset()
    tiny.assert_bitwise(found, run(enabled(other)))


def damage(path: Path, what: str) -> None:
    data = path.read_bytes()
    if what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif what == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif what == "missing":
        path.unlink()
    else:
        with zipfile.ZipFile(path) as file:
            contents = {name: file.read(name) for name in file.namelist()}
        contents["header.json"] = json.dumps(json.loads(contents["header.json"]) | {what: "another"}).encode()
        with zipfile.ZipFile(path, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated", "BadZipFile"),
        ("flipped", ""),
        ("missing", "FileNotFoundError"),
        ("torch", f"torch another, expected {torch.__version__}"),
        ("cachedit_fx", "cachedit_fx another, expected "),
        ("processor", "processor another, expected "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_warning(file, caplog, what, says):
    damage(file, what)
    model = enabled()
    with caplog.at_level(logging.WARNING):
        assert not cachedit_fx.load_compiled(model, file)
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith(f"cachedit_fx: the compiled graphs in {file} are not used") and says in text
    assert enabled_of(model).saved is None


def test_a_cache_folder_that_cannot_be_written_to_is_one_warning(file, caplog):
    with patch("cachedit_fx.saving.compiled.install_libraries", side_effect=PermissionError(13, "Permission denied")):
        assert not cachedit_fx.load_compiled(enabled(), file)
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: enabled(residual_diff_threshold=0.5), ""),
        (lambda: enabled(Fn_compute_blocks=2), "other arguments of enable_cache"),
        (lambda: enabled(tiny.build(num_blocks=tiny.NUM_BLOCKS + 1)), "the weight blocks."),
        (tiny.build, "enable_cache was not called for it"),
    ],
    ids=["threshold", "settings", "weights", "not-enabled"],
)
def test_graphs_of_another_module_are_refused_when_they_are_loaded(file, caplog, make, says):
    with caplog.at_level(logging.WARNING):
        cachedit_fx.load_compiled(make(), file)
    assert bool(caplog.records) == bool(says) and says in caplog.text


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (dict(fast_dispatch=False), "fast_dispatch is False"),
        (dict(dynamic=True), "its sizes are dynamic"),
    ],
    ids=["fast-dispatch", "dynamic"],
)
def test_what_cannot_be_saved_is_reported(tmp_path, caplog, others, says):
    with caplog.at_level(logging.WARNING):
        saved(tmp_path / "file", **others)
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("cachedit_fx: the graphs of Transformer are not saved.") and says in text
    model = enabled(**others)
    assert cachedit_fx.load_compiled(model, tmp_path / "file") and enabled_of(model).saved is None


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with patch("os.replace", side_effect=OSError), pytest.raises(OSError):
        saved(tmp_path / "file")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


PROCESS = """
import logging, sys
import torch
import torch._dynamo.utils
import cachedit_fx
from tests import tiny
logging.basicConfig(level=logging.WARNING)
torch.set_num_threads(1)
model = cachedit_fx.enable_cache(tiny.build(num_blocks=3), **tiny.fields(inner_backend="eager"))
if sys.argv[1] == "load":
    assert cachedit_fx.load_compiled(model, sys.argv[2])
with torch.no_grad():
    outputs = tiny.generate(model, tiny.prompt(), tiny.latents())
if sys.argv[1] == "save":
    cachedit_fx.save_compiled(model, sys.argv[2])
counters = torch._dynamo.utils.counters
torch.save((outputs, counters["stats"]["unique_graphs"]), sys.argv[3])
"""


def test_a_second_process_does_not_run_dynamo(tmp_path):
    """Sets of strings have another order in another process. tests/test_serving.py has a test with Inductor."""
    found = []
    for number, action in enumerate(("save", "load")):
        result = tmp_path / f"{action}.pt"
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, action, str(tmp_path / "file"), str(result)],
            env={**os.environ, "PYTHONPATH": ".", "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        assert not done.returncode and "cachedit_fx:" not in done.stderr, done.stderr
        found.append(torch.load(result))
    (outputs, num_traced), (loaded, num_traced_again) = found
    tiny.assert_bitwise(loaded, outputs)
    assert (num_traced, num_traced_again) == (2, 0)  # For the call, and to record it.


def test_only_libraries_in_the_cache_are_written(tmp_path):
    from cachedit_fx.saving.artifact_file import ArtifactFile, UnusableFileError

    ArtifactFile(libraries={"../outside.so": b""}).write(tmp_path / "file")
    with pytest.raises(UnusableFileError, match=r"a library outside of the cache: \.\./outside\.so"):
        ArtifactFile.read(tmp_path / "file")
    assert not (inductor_cache_folder().parent / "outside.so").exists()
