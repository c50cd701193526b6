"""The matrix of versions leaves out what is not to be had, and states the reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import version_matrix
from tests.version_matrix import LeftOut, Result


def report(*requirements: str) -> dict[str, Any]:
    """The report of pip about one wheel."""
    url = {"url": "https://example.org/torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl"}
    return {"install": [{"metadata": {"requires_dist": [*requirements]}, "download_info": url}]}


def test_a_build_that_requires_cuda_packages_is_left_out():
    version_matrix.needs_cuda(report("filelock", "sympy>=1.13", 'optree>=0.13; extra == "optree"'))
    with pytest.raises(LeftOut, match=r"requires nvidia-cudnn-cu13: .*torch-2\.13\.0-cp312"):
        version_matrix.needs_cuda(report("filelock", "nvidia-cudnn-cu13==9.20"))


def test_cuda_packages_of_another_platform_are_no_reason(monkeypatch: pytest.MonkeyPatch):
    found = report('cuda-bindings>=13; platform_system == "Linux"')
    monkeypatch.setattr(sys, "platform", "darwin")
    version_matrix.needs_cuda(found)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(LeftOut, match="cuda-bindings"):
        version_matrix.needs_cuda(found)


def test_an_interpreter_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    version_matrix.interpreter.cache_clear()
    with pytest.raises(LeftOut, match=r"no Python 3\.12 in PATH"):
        version_matrix.interpreter("3.12")


def test_every_combination_is_in_the_table():
    results = [Result("3.11", "2.13.0", "9 passed", ran=True), Result("3.12", "2.13.0", "left out: no Python 3.12")]
    assert version_matrix.table(results).splitlines() == [
        "Python  torch     result",
        "3.11    2.13.0    9 passed",
        "3.12    2.13.0    left out: no Python 3.12",
    ]
