"""`python -m cachedit_fx explain module:factory`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cachedit_fx.__main__ import main
from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.reference import options_table

FACTORIES = """
from tests import hybrid

def cached():
    return hybrid.build(), hybrid.calls()[0]

def missed():
    return hybrid.build(hybrid.LosesText), (), hybrid.calls()[0]

def positional():
    return hybrid.build(), tuple(hybrid.calls()[0].values())

def wrong():
    return 3
"""
FN = ["-o", "Fn_compute_blocks=1"]


@pytest.fixture(autouse=True)
def factories(tmp_path, monkeypatch):
    (tmp_path / "shell_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])  # What the command adds goes with the test.
    yield tmp_path
    sys.modules.pop("shell_factories", None)


@pytest.mark.parametrize(("factory", "status"), [("cached", 0), ("positional", 0), ("missed", 1)])
def test_the_page_is_printed_and_the_status_tells_whether_all_is_cached(factory, status, capsys):
    assert main(["explain", f"shell_factories:{factory}", *FN]) == status
    page = capsys.readouterr().out
    assert page.startswith("cachedit_fx.explain: ")
    assert ("runs without caching" in page) == bool(status)


def test_a_file_is_a_factory_too_and_json_is_written(factories, capsys):
    target = factories / "out.json"
    assert main(["explain", str(factories / "shell_factories.py:cached"), *FN, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["graphs"][0]["is_cached"] is True


def test_a_graph_or_the_diff_in_place_of_the_page(capsys):
    main(["explain", "shell_factories:cached", *FN, "--graph", "after"])
    assert "step.decide(0" in capsys.readouterr().out
    main(["explain", "shell_factories:cached", *FN, "--diff"])
    assert capsys.readouterr().out.startswith("--- before\n+++ after\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shell_factories:nothing"], "factory names 'nothing', which 'shell_factories' does not have"),
        (["no_such_module:f"], "factory names the module 'no_such_module', which was not found"),
        (["shell_factories"], "factory must be module:function or path.py:function, got 'shell_factories'"),
        (["shell_factories:wrong"], "must return (target, kwargs), (target, args) or (target, args, kwargs), got int"),
        (["shell_factories:cached", "-o", "Fn=1"], "option 'Fn' (given 1) is unknown"),
        (["shell_factories:cached", "-o", "Fn"], "option must be NAME=VALUE, got 'Fn'"),
    ],
)
def test_wrong_arguments_are_told(arguments, said, capsys):
    assert main(["explain", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_options_are_listed_with_what_they_mean(capsys):
    assert main(["options"]) == 0
    listed = capsys.readouterr().out
    for name, declared in OPTIONS.items():
        assert name in listed
        assert " ".join(declared.doc.replace("`", "").split()) in " ".join(listed.split()) or declared.flat_of
    assert "Budget(coefficients=) or rescale_coefficients  (default: (); a list of finite numbers)" in listed
    assert main(["options", "--markdown"]) == 0
    assert capsys.readouterr().out == options_table(OPTIONS) + "\n"


@pytest.mark.slow
def test_it_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "cachedit_fx", "explain", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "module:function, or path.py:function" in ran.stdout
