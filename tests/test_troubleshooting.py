"""docs/troubleshooting.md has an entry for every reason, and none for a reason that does not exist.

`tests/test_messages.py` holds that it has an entry for every error and warning.
"""

from __future__ import annotations

import re

import pytest

from cachedit_fx.inspect import why_idle
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.runtime.stats import CacheStats
from tests.troubleshooting import PAGE, entries

TEXT = PAGE.read_text(encoding="utf-8")


def section(heading: str) -> str:
    return TEXT.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]


def test_every_cause_of_a_mismatch_has_an_entry():
    listed = re.findall(r"^\| `([\w-]+)` \|", section("A graph does not match"), re.MULTILINE)
    assert listed == [cause.value for cause in Cause]


@pytest.mark.parametrize("reason", why_idle._WHY)
def test_every_reason_why_nothing_was_reused_has_an_entry(reason: str):
    is_listed(why_idle.why_none_reused("", [stats(["warmup", reason])]))


@pytest.mark.parametrize(
    "of_sessions",
    [
        [["warmup", "warmup"]],
        [["warmup"]],
        [["warmup"], ["warmup"]],
    ],
    ids=["warmup", "one-step", "single-steps"],
)
def test_the_other_reasons_why_nothing_was_reused_have_an_entry(of_sessions: list[list[str]]):
    is_listed(why_idle.why_none_reused("", [stats(decisions) for decisions in of_sessions]))


def is_listed(line: str) -> None:
    quoted = [text for text in entries() if not text.startswith("cachedit_fx:")]
    assert any(text in line for text in quoted), line


def stats(decisions: list[str]) -> CacheStats:
    return CacheStats(
        region="blocks",
        session="one",
        num_steps=len(decisions),
        cached_steps=[],
        residual_diffs={},
        decisions=decisions,
        state_bytes=0,
        peak_state_bytes=0,
        module="",
    )


def test_no_message_is_quoted_twice():
    quoted = re.findall(r"^[>|] (`+)(cachedit_fx:.+?)\1(?=\s|$)", TEXT, re.MULTILINE)
    assert len(quoted) == len(set(quoted)) > 70
