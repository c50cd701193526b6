"""The command `cachedit-fx`: its help and exit codes, and `report`, `tune` and `doctor`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx import tuning
from cachedit_fx.errors import PassError
from cachedit_fx.shell import checkup, installed_models, small_model, tune_command, user_code
from cachedit_fx.shell.command_line import COMMANDS, main
from tests import hybrid

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = """
from tests import hybrid

class Setup:
    pipe = None
    calls = []

def model():
    return hybrid.build(), hybrid.calls()

def loses_text():
    return hybrid.build(hybrid.LosesText), hybrid.calls()

def by_function():
    print("printed by the factory")
    return hybrid.build(), [lambda model: [model(**call) for call in hybrid.calls()]]

def fails():
    return hybrid.build(), [{"hidden_states": 3}]
"""
EAGER = ["-o", "inner_backend=eager", "-o", "max_warmup_steps=1", "-o", "residual_diff_threshold=1.0"]


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("run_factories", None)


# The command line.


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=["cachedit-fx", *COMMANDS])
def test_help_fits_a_screen_and_names_the_exit_codes(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    assert len(lines) <= 30 and max(map(len, lines)) <= 82
    assert "xit code" in "\n".join(lines) or command == ("options",)


def test_the_documentation_names_every_command_and_every_argument():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(add_help=False)
        command.add_arguments(parser)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert [flag for flag in flags if f"`{flag}" not in text and f" {flag} " not in text] == []
        assert f"| `{name}` |" in text


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"cachedit-fx {cachedit_fx.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["explian", "a:b"], "invalid choice: 'explian'"),
        (["explain", "a:b", "--html", "none/page.html"], "'none/page.html' is in a folder that does not exist (none)"),
        (["report", "a:b", "--json", "."], "'.' is a folder; pass the path of a file to write"),
        (["tune", "a:b"], "the following arguments are required: --target"),
    ],
)
def test_wrong_usage_ends_with_a_message_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_console_script_and_the_module_run_the_same_function():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"console_scripts": ["cachedit-fx = cachedit_fx.shell.command_line:main"]' in text
    assert main.__module__ == "cachedit_fx.shell.command_line"
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(
        [sys.executable, "-m", "cachedit_fx", "report", "no_such_module:f"],
        capture_output=True,
        text=True,
        env=os.environ | path,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "cachedit_fx: factory names the module 'no_such_module'" in ran.stderr and "Traceback" not in ran.stderr


# What the user's code does.


def test_a_factory_may_return_an_object_with_a_pipeline_and_calls():
    setup = SimpleNamespace(pipe=object(), calls=[{"prompt": "a cat"}], images=None)
    assert user_code._made("f", setup) == user_code.Made(setup.pipe, setup.calls)


def test_a_bug_of_the_package_is_not_reported_as_an_error_of_the_user():
    with pytest.raises(PassError), user_code.errors_reported("a call"):
        raise PassError("x")
    with pytest.raises(AttributeError), user_code.errors_reported("a call"):
        [*installed_models._classes(None, {})]


def test_the_traceback_of_an_error_can_be_shown(capsys):
    assert main(["report", "run_factories:fails", *EAGER]) == 2
    assert "a call of the pipeline raised TypeError: " in capsys.readouterr().err
    with pytest.raises(cachedit_fx.errors.ConfigError) as caught:
        main(["report", "run_factories:fails", *EAGER, "--traceback"])
    assert isinstance(caught.value.__cause__, TypeError)


# report


def test_report_shows_what_was_reused_and_writes_the_page(capsys):
    assert main(["report", "run_factories:model", *EAGER, "--html", "page.html", "--json", "run.json"]) == 0
    assert "warmup" in capsys.readouterr().out
    assert "<html" in Path("page.html").read_text(encoding="utf-8")
    (calls,) = json.loads(Path("run.json").read_text())["calls"].values()
    assert calls["computed"] == 1 and calls["reused"] == len(hybrid.calls()) - 1


def test_report_says_that_the_pipeline_is_not_the_one_that_a_file_was_tuned_on(caplog):
    result(True).save("tuned.json")
    assert main(["report", "run_factories:model", "--config", "tuned.json", *EAGER]) == 0
    assert "was tuned on something else" in caplog.text and "FluxPipeline" in caplog.text


def test_report_prints_nothing_but_json_on_request(capsys):
    assert main(["report", "run_factories:by_function", *EAGER, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["title"] == "Hybrid"
    assert "printed by the factory" in printed.err


@pytest.mark.parametrize(
    ("factory", "option", "status"),
    [("loses_text", "max_warmup_steps=1", 1), ("model", "max_warmup_steps=99", 1), ("model", "shadow=true", 0)],
    ids=["uncached", "nothing-reused", "shadow"],
)
def test_the_exit_code_of_report_tells_whether_the_cache_had_an_effect(factory, option, status, capsys):
    assert main(["report", f"run_factories:{factory}", *EAGER, "-o", option]) == status


# tune


def result(is_reached: bool) -> tuning.TuneResult:
    quality = tuning.Quality(psnr=41.0, rel_l2=float("nan"), speedup=2.0, share_computed=0.5)
    config = cachedit_fx.CacheConfig(max_warmup_steps=2)
    return tuning.TuneResult(
        config,
        tuning.targets.Target("psnr", 40.0),
        is_reached,
        predicted=quality,
        verified=quality,
        is_confirmed=True,
        frontier=(tuning.Point(config, quality, False),),
        signature={"pipeline": "FluxPipeline"},
    )


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], dict[str, Any]]:
    """Replaces the search by its result, and returns the arguments that it receives."""

    def replaced(is_reached: bool) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def tune(pipe: Any, calls: Any, **arguments: Any) -> tuning.TuneResult:
            given.update(arguments, calls=calls)
            return result(is_reached)

        monkeypatch.setattr(tune_command, "tune", tune)
        return given

    return replaced


def test_tune_passes_its_arguments_on_and_saves_what_was_found(tuned, capsys):
    given = tuned(True)
    files = ["--save", "tuned.json", "--plot", "frontier.png"]
    limits = ["--at-least", "psnr=40", "--budget", "runs=3", "--alternatives", "off"]
    assert main(["tune", "run_factories:model", "--target", "fastest", *limits, *files]) == 0
    assert {**given, "calls": len(given["calls"])} == {
        "target": "fastest",
        "at_least": "psnr=40",
        "alternatives": "off",
        "budget": "runs=3",
        "calls": len(hybrid.calls()),
    }
    printed = capsys.readouterr().out
    assert "psnr=40 reached (" in printed and "  config:    max_warmup_steps=2, forecaster=foca\n" in printed
    assert tuning.load_tuned("tuned.json").config == cachedit_fx.CacheConfig(max_warmup_steps=2)
    assert Path("frontier.png").stat().st_size


def test_tune_ends_with_1_if_the_target_is_not_reached_and_prints_json(tuned, capsys):
    tuned(False)
    assert main(["tune", "run_factories:model", "--target", "psnr=40", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["is_reached"] is False and found["verified"]["psnr"] == 41.0
    assert found["frontier"][0]["quality"]["rel_l2"] is None
    assert found["cache_config"] == {"forecaster": {"type": "foca"}, "max_warmup_steps": 2}


def test_tune_reports_a_wrong_target_with_exit_code_2(capsys):
    assert main(["tune", "run_factories:model", "--target", "ssim=1"]) == 2
    assert "or one of psnr, rel_l2, speedup with a number" in capsys.readouterr().err


# doctor


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "inner_compiler", lambda device: checkup.Check("ok", f"Inductor: {device}"))


def test_doctor_finds_no_problem_here(without_inductor, capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cachedit-fx doctor found no problem.\n")
    assert f"torch {torch.__version__}" in text and "diffusers" in text
    assert "A small transformer is cached and reuses steps" in text
    assert max(map(len, text.splitlines())) <= 100


def test_doctor_names_what_turns_compilation_off(without_inductor, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("TORCHDYNAMO_SUPPRESS_ERRORS", "1")
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    checks = {check["text"]: check for check in found["checks"]}
    assert found["is_fine"] is False
    assert checks["TORCH_COMPILE_DISABLE=1: torch.compile is turned off"]["kind"] == "problem"
    assert any(text.startswith("TORCHDYNAMO_SUPPRESS_ERRORS=1: a model that cannot be") for text in checks)
    assert any("recompile_limit is 2" in text for text in checks)
    assert any(text.startswith("A small transformer is not cached: Dynamo ran no graph") for text in checks)


def test_the_check_of_caching_notices_a_reused_step_with_a_wrong_result(monkeypatch):
    assert small_model.why_not_cached() == ""
    reused = small_model.SmallTransformer.reused
    monkeypatch.setattr(small_model.SmallTransformer, "reused", lambda *args: reused(*args) + 1)
    assert small_model.why_not_cached() == "the output of a reused step is wrong"


def test_the_check_of_caching_states_why_nothing_is_cached(monkeypatch):
    monkeypatch.setitem(small_model._FIELDS, "Fn_compute_blocks", small_model.NUM_BLOCKS)
    assert small_model.why_not_cached().startswith("too-few-blocks: ")


@pytest.mark.slow
def test_the_inner_compiler_is_checked_by_compiling_something(monkeypatch):
    assert re.fullmatch(r"Inductor compiles for cpu \(\d+\.\d s\)", checkup.inner_compiler("cpu").text)


def test_a_failing_inner_compiler_is_reported_in_one_line(monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')\n\nmore")

    monkeypatch.setattr(checkup, "InnerCompiler", lambda *_: fail)
    found = checkup.inner_compiler("cpu")
    assert found.kind == "problem" and found.cure.startswith("install a C++ compiler")
    assert found.text == (
        "Inductor does not compile for cpu: InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')"
    )


def test_the_facts_about_a_gpu_are_shown(monkeypatch):
    facts = SimpleNamespace(name="H200", total_memory=139 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(checkup, "_driver", lambda: "570.1")
    gpu = checkup.devices()[1]
    assert gpu == {
        "device": "cuda:0",
        "name": "H200",
        "bytes": 139 * 2**30,
        "capability": "9.0",
        "cuda": "12.8",
        "driver": "570.1",
    }
    from cachedit_fx.shell.doctor_command import _device

    assert _device(gpu) == "cuda:0: H200, 139 GiB, capability 9.0, cuda 12.8, driver 570.1"


def test_the_installed_models_are_compared_with_the_tested_ones(tmp_path, monkeypatch):
    (tmp_path / "models" / "transformers").mkdir(parents=True)
    code = (
        "class FluxTransformer2DModel(ModelMixin): ...\nclass Newer(x.ModelMixin, Y): ...\nclass Block(Module): ...\n"
        "class TransformerTemporalModel(ModelMixin): ...\n"
    )
    (tmp_path / "models" / "transformers" / "transformer_flux.py").write_text(code)
    (tmp_path / "models" / "unet.py").write_text("class UVit2DModel(ModelMixin): ...\nclass UNet(ModelMixin): ...\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(installed_models.importlib.util, "find_spec", lambda _: spec)
    found = installed_models.installed_models()
    assert found is not None
    assert found.cached.keys() == {"FluxTransformer2DModel", "UVit2DModel"} and found.untested == ["Newer"]
    assert found.uncached == {"TransformerTemporalModel": "is a layer of UNets, with a single block"}
    monkeypatch.setattr(installed_models.importlib.util, "find_spec", lambda _: None)
    assert installed_models.installed_models() is None
