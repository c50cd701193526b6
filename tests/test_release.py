"""The files of the project that a release or a host reads: versions, changelog, templates, workflow, hooks."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from cachedit_fx import __version__

ROOT = Path(__file__).parents[1]
CHECK = runpy.run_path(str(ROOT / ".ci" / "check_release.py"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
DATED = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n## [0.1.0] - 2026-11-30\n"


def test_the_version_is_the_newest_one_in_the_changelog():
    assert CHECK["own_version"]() == __version__
    assert CHECK["version_problems"](__version__, CHANGELOG, is_final=False) == []


@pytest.mark.parametrize(
    ("version", "changelog", "is_final", "says"),
    [
        ("0.3.0", DATED, False, "the newest version is 0.2.0, _version.py has 0.3.0"),
        ("0.2", DATED.replace("0.2.0", "0.2"), False, "'0.2' is not MAJOR.MINOR.PATCH"),
        ("0.2.0", DATED.replace("2026-12-01", "unreleased"), True, "0.2.0 has no date (YYYY-MM-DD), found unreleased"),
        ("0.2.0", DATED.replace("2026-12-01", "soon"), False, "0.2.0 has no date (YYYY-MM-DD), found soon"),
        ("0.2.0", "# Changelog\n", False, "the newest version is missing"),
    ],
)
def test_a_version_that_does_not_fit_is_reported(version: str, changelog: str, is_final: bool, says: str):
    (problem,) = CHECK["version_problems"](version, changelog, is_final=is_final)
    assert says in problem


def test_a_dated_version_is_final():
    assert CHECK["version_problems"]("0.2.0", DATED, is_final=True) == []


def test_the_changelog_has_the_headings_of_its_format():
    groups = re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)
    assert {*groups} <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert all(CHECK["HEADING"].match(line) for line in CHANGELOG.splitlines() if line.startswith("## "))


def test_the_workflow_runs_what_runs_locally():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands


@pytest.mark.parametrize("name", ["bug", "feature", "model"])
def test_a_template_for_issues_is_a_form(name: str):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_hooks_before_a_commit_use_the_tools_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks[0]["hooks"])
