"""The README is correct: its code runs, and its table of models agrees with the passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cachedit_fx
from cachedit_fx.config.fields import FIELD_NAMES, OPTION_NAMES, OPTIONS
from cachedit_fx.config.reference import options_table
from cachedit_fx.passes.plan import Plan
from tests.models import FAMILIES, Family
from tests.synthetic import plan

README = (Path(__file__).parent.parent / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two header lines."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_the_first_code_block_runs_and_reuses_steps():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    (stats,) = cachedit_fx.summary(names["model"])
    assert stats.num_steps == 8
    assert stats.cached_steps
    shown = README.split("prints (random weights", 1)[1].split("```")[1]
    assert [len(stats.cached_steps), 8] == [int(cell) for cell in re.findall(r"\| (\d+) ", shown)]


def test_the_table_of_options_is_the_generated_one():
    """`python -m cachedit_fx options --markdown` prints the table."""
    section = README.split("## Options\n", 1)[1].split("\n## ", 1)[0]
    assert f"\n\n{options_table(OPTIONS)}\n\n" in section


def test_every_option_is_in_the_table_with_its_default():
    listed = {name: row[1] for row in rows("Options") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(listed) == set(OPTION_NAMES)
    assert listed["residual_diff_threshold"] == "None"  # The default of the rule that is listed last.
    for name in set(FIELD_NAMES) - {"residual_diff_threshold", "max_state_bytes"}:
        default = getattr(cachedit_fx.CacheConfig(), name)
        shown = (
            f"{type(default).__name__}()" if isinstance(default, cachedit_fx.forecasters.Forecaster) else str(default)
        )
        assert shown == listed[name].replace('"', "")
    assert eval(listed["max_state_bytes"]) == cachedit_fx.CacheConfig().max_state_bytes


def test_the_readme_shows_the_defaults_of_cache_dit():
    (shown,) = re.findall(r"cache-dit's own defaults are (.*?)\. ", README, re.DOTALL)
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


@pytest.mark.parametrize("row", rows("Which models match"), ids=lambda row: row[0])
def test_every_model_of_the_table_matches_the_stated_pattern(row):
    name, lists, patterns = row
    family = next(family for family in FAMILIES.values() if type(family.build()).__name__ == name)
    found = plan_of(family)
    assert [match.blocks.path for match in found.chain] == re.findall(r"`(\w+)`", lists)
    assert [str(match.template.number) for match in found.chain] == re.findall(r"\d", patterns)
