"""docs/from-cache-dit.md has a true verdict on every public name and argument of cache-dit."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cachedit_fx
from cachedit_fx import CacheConfig, load_configs
from cachedit_fx.config.cache_config import FIELD_NAMES
from cachedit_fx.forecasters import TaylorSeerCalibratorConfig
from tests.peers.names import RECORDED, names_of, recorded

PAGE = Path(__file__).parents[1] / "docs" / "from-cache-dit.md"
VERDICTS = ("same", "moved", "renamed", "ignored", "not here")


class Row(NamedTuple):
    """A row of a table of the page: a name of cache-dit, or some of its arguments."""

    name: str
    arguments: tuple[str, ...]
    verdict: str
    use: str


@functools.cache
def rows() -> tuple[Row, ...]:
    return tuple(_rows(PAGE.read_text(encoding="utf-8").split("## Every name")[1]))


def _rows(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        if line.startswith("| `"):
            names, verdict, use = (cell.strip() for cell in line.strip("|").split(" | "))
            for name, arguments in re.findall(r"`(\w+)(?:\(([^)]*)\))?`", names):
                yield Row(name, tuple(re.findall(r"\w+", arguments)), verdict, use)


def counterparts() -> dict[str, Any]:
    """The object here for each name of cache-dit that is the same, moved or renamed."""
    found = {}
    for row in rows():
        if not row.arguments and row.verdict == "same":
            found[row.name] = getattr(cachedit_fx, row.name)
        elif not row.arguments and row.verdict in ("moved", "renamed"):
            found[row.name] = imported(row.use)
    return found


def imported(use: str) -> Any:
    """The object whose full name is the first code of a cell."""
    path = re.search(r"`cachedit_fx\.([\w.]+)", use)
    assert path is not None, use
    found: Any = cachedit_fx
    for part in path[1].split("."):
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def test_every_name_and_argument_of_cache_dit_has_one_verdict():
    listed = [(row.name, argument) for row in rows() for argument in row.arguments or ("",)]
    expected = [(name, part) for name, parts in recorded().items() for part in ("", *parts)]
    assert sorted(listed) == sorted(expected)
    assert {row.verdict for row in rows()} == set(VERDICTS)


def test_every_name_that_is_the_same_moved_or_renamed_can_be_imported():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert len(counterparts()) > 25
        for row in rows():
            if row.verdict == "renamed":
                imported(row.use)


def test_every_argument_that_is_the_same_exists_here():
    found = counterparts()
    for row in rows():
        if row.verdict == "same" and row.arguments:
            assert set(row.arguments) <= parts_of(found[row.name]), row


def parts_of(value: Any) -> set[str]:
    """The arguments of a function or a class, and the members of an enumeration."""
    parts = set(inspect.signature(value).parameters) | set(getattr(value, "__members__", ()))
    if isinstance(value, type) and issubclass(value, CacheConfig):
        parts |= set(FIELD_NAMES)
    return parts


def test_the_file_on_the_page_loads_and_its_warning_is_the_one_shown(tmp_path, caplog):
    text = PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "cache.yaml").write_text(shown, encoding="utf-8")
    config = load_configs(tmp_path / "cache.yaml")["cache_config"]
    assert (config.max_warmup_steps, config.warmup_interval, config.residual_diff_threshold) == (8, 2, 0.12)
    assert config.forecaster == TaylorSeerCalibratorConfig(enable_encoder_calibrator=False)
    assert f"```\n{caplog.messages[0]}\n```" in text


@pytest.mark.slow
def test_the_recorded_names_are_those_of_the_installed_version():
    package = pytest.importorskip("cache_dit")
    content = json.loads(RECORDED.read_text(encoding="utf-8"))
    if package.__version__ != content["version"]:
        pytest.skip(f"cache-dit {package.__version__} is installed, and {content['version']} is recorded")
    assert names_of(package) == content["names"]
