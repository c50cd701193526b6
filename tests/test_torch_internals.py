"""A private name that a version of torch lacks is reported at the import, with the name and the versions."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch

from cachedit_fx.frontend import torch_internals

VERSIONS = f"expected: torch {torch_internals.SUPPORTED_VERSIONS}; the tests run on {torch_internals.tested_versions()}"
ATTRIBUTES = [
    ("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx"),
    ("torch", "_TorchCompileInductorWrapper"),
]


def imported() -> list[tuple[str, str]]:
    """The module and the name of every import at the top of `torch_internals` that can fail."""
    with open(torch_internals.__file__, encoding="utf-8") as file:
        (block,) = (node for node in ast.parse(file.read()).body if isinstance(node, ast.Try))
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return [(str(node.module), alias.name) for node in found for alias in node.names]


@pytest.mark.parametrize(("module", "name"), [*imported(), *ATTRIBUTES], ids=lambda part: part.rpartition(".")[2])
def test_a_missing_name_is_reported_at_the_import(module: str, name: str, monkeypatch: pytest.MonkeyPatch):
    holder, _, last = f"{module}.{name}".rpartition(".")
    if isinstance(getattr(importlib.import_module(module), name, None), types.ModuleType):
        monkeypatch.setitem(sys.modules, f"{module}.{name}", None)
    monkeypatch.delattr(f"{holder}.{last}")
    with pytest.raises(ImportError) as raised:
        runpy.run_path(str(torch_internals.__file__))
    text = str(raised.value)
    assert re.search(rf"\b{last}\b", text) and f"found:    torch {torch.__version__}: " in text and VERSIONS in text


def test_the_names_that_can_be_missing_are_found():
    assert ("torch._dynamo.convert_frame", "compile_lock") in imported() and len(imported()) > 12


@pytest.mark.parametrize("name", ["f_locals", "f_code"])
def test_an_attribute_that_the_state_of_a_trace_lacks_is_reported(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_internals, "_translator", object)
    read = torch_internals.traced_locals if name == "f_locals" else torch_internals.is_resumed
    with pytest.raises(ImportError, match=f"found: .*{name}") as raised:
        read()
    assert VERSIONS in str(raised.value)


def test_the_package_is_not_imported_without_a_name():
    code = "import torch._dynamo.convert_frame as module; del module.compile_lock; import cachedit_fx"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = found.stderr[found.stderr.index("cachedit_fx: this version of torch lacks a private name") :]
    assert found.returncode == 1 and "cannot import name 'compile_lock' from 'torch._dynamo.convert_frame'" in last
    assert VERSIONS in last and "AttributeError" not in found.stderr
