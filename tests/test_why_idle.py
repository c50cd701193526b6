"""A summary states why no step was reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx.inspect.why_idle import why_none_reused
from cachedit_fx.runtime.stats import CacheStats
from tests.idle import enabled, run, warnings_in
from tests.tiny import TIMES, latents, prompt, step


@pytest.fixture
def logged_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: warnings_in(caplog)


def stepping(model: Any, times: Any = TIMES, make_prompt: Callable[[int], Tensor] | None = None) -> None:
    text = prompt()
    with torch.no_grad():
        for number, timestep in enumerate(times):
            step(model, make_prompt(number) if make_prompt is not None else text, timestep, latents())


@pytest.mark.parametrize(
    ("fields", "how", "line"),
    [
        pytest.param(
            dict(residual_diff_threshold=0.04),
            {},
            "0 of 8 steps were reused: no diff was below the threshold of 0.04; the smallest was 0.05, at step 1",
            id="diff",
        ),
        pytest.param(
            dict(max_warmup_steps=8),
            {},
            "0 of 8 steps were reused: all of them are warm-up steps (max_warmup_steps); 8 steps are too few",
            id="few-steps",
        ),
        pytest.param({}, dict(times=[0.5]), "0 of 1 steps were reused: the first step of a session", id="one-step"),
        pytest.param(
            {},
            dict(times=[0.5] * 4),
            "0 of 4 steps were reused: each of 4 sessions had a single step",
            id="a-shared-prompt",
        ),
        pytest.param(dict(residual_diff_threshold=0.0), {}, "residual_diff_threshold is 0 or less", id="threshold"),
        pytest.param(dict(max_cached_steps=0), {}, "max_cached_steps allows no reused step", id="limit"),
        pytest.param(
            dict(decision_rule="budget", residual_diff_threshold=0.01),
            {},
            "no sum of diffs was below the threshold of 0.01; the smallest was 0.05",
            id="budget",
        ),
    ],
)
def test_a_summary_says_why_nothing_was_reused(fields, how, line):
    model = enabled(**fields)
    stepping(model, **how)
    found = cachedit_fx.summary(model, logging=False)
    (note,) = found.notes
    assert note.startswith("0 of ") and line in note
    assert note in str(found) and cachedit_fx.report(model).to_dict()["notes"] == [note]


def test_windows_that_cannot_be_distinguished_are_named():
    entry = CacheStats("blocks[1:]", "cond", 3, decisions=["warmup", "nan", "nan"])
    assert "windows or tiles share a prompt" in why_none_reused("", [entry])
    assert why_none_reused("transformer", [entry]) == ""


def test_a_summary_of_a_run_with_reused_steps_has_no_such_note():
    model = enabled()
    run(model)
    assert cachedit_fx.summary(model, logging=False).notes == []
