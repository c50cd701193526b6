"""The README is correct: its snippets run, and its tables and those of docs/options.md agree with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx.config.fields import FIELD_NAMES, OPTION_NAMES, OPTIONS
from cachedit_fx.config.reference import options_table
from cachedit_fx.passes.plan import Plan
from cachedit_fx.patterns import unregister_pattern
from tests.models import FAMILIES, Family
from tests.synthetic import plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS_PAGE = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two header lines."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def decisions(text: str) -> str:
    """`text` without numbers that have a fraction, which depend on rounding."""
    return re.sub(r"\d+\.\d+", "#", text)


@pytest.mark.slow
def test_every_snippet_runs_as_printed_and_prints_what_is_shown(tmp_path, monkeypatch, capsys, caplog):
    """The snippets follow each other in one process. Inductor compiles the model alone: the pipeline takes too long."""
    inner = cachedit_fx.frontend.inner_compiler
    as_it_is = (lambda gm, _inputs: gm, False)
    inductor = inner.inductor
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed, compared = "", 0
    try:
        for language, text in BLOCK.findall(README):
            if language == "python":
                is_compiled = "torch.compile(" in text
                monkeypatch.setattr(inner, "inductor", inductor if is_compiled else lambda *_: as_it_is)
                exec(compile(text, "README.md", "exec"), names)
                printed = capsys.readouterr().out
            elif not language:
                assert decisions(text) in decisions(printed)
                compared += 1
    finally:
        unregister_pattern("two-scales")
    assert compared == 2
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.yaml", "explanation.html", "run.html"}
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    for module in (names["pipe"], names["model"]):
        assert any(stats.cached_steps for stats in cachedit_fx.summary(module))


def test_the_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250


def test_the_files_that_the_readme_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition("#")
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


def test_the_table_of_options_is_the_generated_one():
    """`python -m cachedit_fx options --markdown` prints the table."""
    assert OPTIONS_PAGE.endswith(f"\n\n{options_table(OPTIONS)}\n")


def test_every_option_is_in_the_table_with_its_default():
    listed = {name: row[1] for row in rows(OPTIONS_PAGE, "Table") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(listed) == set(OPTION_NAMES)
    assert listed["residual_diff_threshold"] == "None"  # The default of the rule that is listed last.
    for name in set(FIELD_NAMES) - {"residual_diff_threshold", "max_state_bytes"}:
        default = getattr(cachedit_fx.CacheConfig(), name)
        shown = (
            f"{type(default).__name__}()" if isinstance(default, cachedit_fx.forecasters.Forecaster) else str(default)
        )
        assert shown == listed[name].replace('"', "")
    assert eval(listed["max_state_bytes"]) == cachedit_fx.CacheConfig().max_state_bytes


def test_the_page_of_options_shows_the_defaults_of_cache_dit():
    (shown,) = re.findall(r"cache-dit's own defaults are (.*?)\. ", OPTIONS_PAGE, re.DOTALL)
    fields = dict(field.split("=") for field in re.findall(r"`(.*?)`", shown))
    theirs = cachedit_fx.DBCacheConfig()
    differ = [
        n
        for n in cachedit_fx.config.cache_config.FIELD_NAMES
        if getattr(theirs, n) != getattr(cachedit_fx.CacheConfig(), n)
    ]
    assert fields == {name: str(getattr(theirs, name)) for name in differ}


def plan_of(family: Family) -> Plan:
    latents = family.latents(1)
    timestep = torch.full((latents.shape[0],), 0.9 * family.timestep_scale)
    inputs = dict(hidden_states=latents, timestep=timestep, return_dict=False, **family.prompt(1).cond)
    with torch.no_grad():
        found = plan(family.build(), inputs)
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize("row", rows(README, "Which models match"), ids=lambda row: row[0])
def test_every_model_of_the_table_matches_the_stated_pattern(row):
    name, lists, patterns = row
    family = next(family for family in FAMILIES.values() if type(family.build()).__name__ == name)
    found = plan_of(family)
    assert [match.blocks.path for match in found.chain] == re.findall(r"`(\w+)`", lists)
    assert [str(match.template.number) for match in found.chain] == re.findall(r"\d", patterns)
