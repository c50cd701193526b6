"""The names that `cachedit_fx` exports, and those that it exported earlier."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import cachedit_fx
from cachedit_fx import _MOVED

MOVED = [(module_name, name) for module_name, names in _MOVED.items() for name in names]


def test_the_package_exports_the_common_names():
    assert len(cachedit_fx.__all__) <= 25
    for name in cachedit_fx.__all__:
        assert name in vars(cachedit_fx), name


@pytest.mark.parametrize(("module_name", "name"), MOVED, ids=[name for _, name in MOVED])
def test_a_moved_name_is_in_its_module_and_its_old_location_warns(module_name: str, name: str):
    module = importlib.import_module(f"cachedit_fx.{module_name}")
    with pytest.warns(
        DeprecationWarning, match=rf"cachedit_fx\.{name} has moved to cachedit_fx\.{module_name}\.{name}"
    ):
        found = getattr(cachedit_fx, name)
    assert found is getattr(module, name)
    assert name in module.__all__


def test_the_warning_names_the_line_that_imports_the_old_name():
    with pytest.warns(DeprecationWarning, match="Decider") as found:
        from cachedit_fx import Decider  # noqa: F401
    assert {warning.filename for warning in found} == {__file__}


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cachedit_fx' has no attribute 'enable_cash'"):
        cachedit_fx.enable_cash  # noqa: B018


def test_the_import_emits_no_warning_and_needs_neither_diffusers_nor_matplotlib():
    code = "import sys, cachedit_fx; sys.exit(any(name in sys.modules for name in ('diffusers', 'matplotlib')))"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:cachedit_fx", "-c", code], check=True)
