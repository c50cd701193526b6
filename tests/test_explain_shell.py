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
    monkeypatch.setattr(sys, "path", [*sys.path])  # Removes after the test what the command adds.
    yield tmp_path
    sys.modules.pop("shell_factories", None)


@pytest.mark.parametrize(("factory", "status"), [("cached", 0), ("positional", 0), ("missed", 1)])
def test_the_page_is_printed_and_the_exit_status_shows_whether_everything_is_cached(factory, status, capsys):
    assert main(["explain", f"shell_factories:{factory}", *FN]) == status
    page = capsys.readouterr().out
    assert page.startswith("cachedit_fx.explain: ")
    assert ("runs without caching" in page) == bool(status)


def test_the_factory_may_be_in_a_file_and_the_output_may_be_json(factories, capsys):
    target = factories / "out.json"
    assert main(["explain", str(factories / "shell_factories.py:cached"), *FN, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["graphs"][0]["is_cached"] is True


def test_a_graph_or_the_diff_can_be_printed_instead_of_the_page(capsys):
    main(["explain", "shell_factories:cached", *FN, "--graph", "after"])
    assert "step.decide(0" in capsys.readouterr().out
    main(["explain", "shell_factories:cached", *FN, "--diff"])
    assert capsys.readouterr().out.startswith("--- before\n+++ after\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shell_factories:nothing"], "factory names 'nothing', which 'shell_factories' does not have"),
        (["no_such_module:f"], "factory names the module 'no_such_module', which was not found"),
        (["shell_factories"], "factory must be module:function or path.py:function, got 'shell_factories'"),
        (["shell_factories:wrong"], "must return (target, kwargs), (target, args) or (target, args, kwargs), got int"),
        (["shell_factories:cached", "-o", "Fn=1"], "option 'Fn' (given 1) is unknown"),
        (["shell_factories:cached", "-o", "Fn"], "option must be NAME=VALUE, got 'Fn'"),
    ],
)
def test_wrong_arguments_print_an_error(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_are_listed_with_their_meaning(capsys):
    assert main(["options"]) == 0
    listed = capsys.readouterr().out
    for name, declared in OPTIONS.items():
        assert name in listed
        assert " ".join(declared.doc.replace("`", "").split()) in " ".join(listed.split()) or declared.flat_of
    assert "Budget(coefficients=) or rescale_coefficients  (default: (); a list of finite numbers)" in listed
    assert main(["options", "--markdown"]) == 0
    assert capsys.readouterr().out == options_table(OPTIONS) + "\n"


@pytest.mark.slow
def test_explain_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "cachedit_fx", "explain", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "module:function, or path.py:function" in ran.stdout
