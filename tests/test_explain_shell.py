"""`cachedit-fx explain module:factory` and `cachedit-fx options`."""

from __future__ import annotations

import json
import sys

import pytest

from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.reference import options_table
from cachedit_fx.shell.command_line import main

FACTORIES = """
from tests import hybrid

def cached():
    return hybrid.build(), hybrid.calls()[0]

def missed():
    return hybrid.build(hybrid.LosesText), (), hybrid.calls()[0]

def positional():
    return hybrid.build(), tuple(hybrid.calls()[0].values())

def several():
    return hybrid.build(), hybrid.calls()

def wrong():
    return 3

def raises():
    return hybrid.build(), {"latents": 3}
"""
FN = ["-o", "Fn_compute_blocks=1"]


@pytest.fixture(autouse=True)
def factories(tmp_path, monkeypatch):
    (tmp_path / "shell_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])  # Removes after the test what the command adds.
    yield tmp_path
    sys.modules.pop("shell_factories", None)


@pytest.mark.parametrize(("factory", "status"), [("cached", 0), ("positional", 0), ("several", 0), ("missed", 1)])
def test_the_page_is_printed_and_the_exit_status_shows_whether_everything_is_cached(factory, status, capsys):
    assert main(["explain", f"shell_factories:{factory}", *FN]) == status
    page = capsys.readouterr().out
    assert page.startswith("cachedit_fx.explain: ")
    assert ("runs without caching" in page) == bool(status)


def test_the_factory_may_be_in_a_file_and_the_output_may_be_json(factories, capsys):
    target = factories / "out.json"
    assert main(["explain", str(factories / "shell_factories.py:cached"), *FN, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["graphs"][0]["is_cached"] is True


def test_json_is_printed_in_place_of_the_page(capsys):
    assert main(["explain", "shell_factories:cached", *FN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["is_cached"] is True


def test_the_options_may_be_in_a_file(factories, capsys):
    file = factories / "config.json"
    file.write_text('{"cache_config": {"Fn_compute_blocks": 2}}')
    assert main(["explain", "shell_factories:cached", "--config", str(file), "-o", "max_warmup_steps=3", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["modules"][0]["config"]
    assert (config["Fn_compute_blocks"], config["max_warmup_steps"]) == (2, 3)


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
        (
            ["shell_factories:wrong"],
            "must return (target, kwargs), (target, args), (target, args, kwargs) or (pip",
        ),
        (["shell_factories:cached", "-o", "Fn=1"], "option 'Fn' (given 1) is unknown. Did you mean 'Fn_c"),
        (["shell_factories:raises"], "the call of the model raised TypeError: "),
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


def test_options_can_be_printed_as_json(capsys):
    assert main(["options", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    (found,) = [entry for entry in listed if entry["option"] == "cache_device"]
    assert found["group"] == "Running and debugging" and found["values"] == "one of 'cpu', or None"
    assert len(listed) >= len(OPTIONS)
