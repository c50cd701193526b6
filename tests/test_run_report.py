"""The report of a run as data, text, HTML fragments and plots."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import cachedit_fx
from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.pages import plot_chain, plot_run, render, thresholds
from cachedit_fx.inspect.pages.axes import ticks
from cachedit_fx.inspect.pages.charts import (
    diff_chart,
    error_chart,
    largest_shown,
    longest_shown,
    scatter_chart,
    time_chart,
)
from cachedit_fx.inspect.pages.ran import Times, duration, num_sessions, verdict_line
from cachedit_fx.inspect.pages.words import BEGINNINGS, REASONS, why
from cachedit_fx.policies import budget, guided_steps, magnitude, position, threshold
from cachedit_fx.runtime.ranks import RANKS_DIFFER
from cachedit_fx.runtime.stats import CacheStats, StepError, Summary
from tests import tiny


def entry(**fields: object) -> CacheStats:
    """A region of a session: three steps computed, two reused."""
    known = dict(
        region="blocks[1:]",
        session="cond",
        num_steps=5,
        cached_steps=[2, 4],
        residual_diffs={2: 0.05, 3: 0.2, 4: 0.0712},
        decisions=["warmup", "warmup", "diff-below", "diff-above", "diff-below"],
        thresholds=dict.fromkeys((2, 3, 4), 0.1),
        step_seconds=[9.0, 0.02, 0.004, 0.021, 0.005],
        timesteps=[1.0, 0.8, 0.6, 0.4, 0.2],
    )
    return CacheStats(**{**known, **fields})


def shadowed() -> CacheStats:
    errors = {2: StepError(True, {"hidden_states": 0.1}, 0.3), 3: StepError(False, {"hidden_states": 0.2}, 0.9)}
    return entry(errors={**errors, 4: StepError(True, {"hidden_states": 0.1}, 0.2)})


def test_report_contains_the_summary_and_writes_the_page(tmp_path: Path) -> None:
    model = tiny.build()
    tiny.generate(tiny.compiled(model), tiny.prompt(), tiny.latents())
    found = cachedit_fx.report(model, tmp_path / "run.html")
    assert found.stats == cachedit_fx.summary(model, logging=False)
    assert found.title == type(model).__name__
    assert str(found) == str(found.stats)
    assert json.loads(json.dumps(found.to_dict()))["stats"][0]["decisions"] == found.stats[0].decisions
    assert found.title in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_a_report_before_any_run_says_so(tmp_path: Path) -> None:
    found = cachedit_fx.report(tiny.build(), tmp_path / "run.html")
    assert "No session has run yet" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "no session has run yet" in found._repr_html_()
    assert found.plot() is not None


def test_every_reason_of_the_policy_has_a_sentence() -> None:
    decide = importlib.import_module("cachedit_fx.policies.decide")
    source = "".join(map(inspect.getsource, (budget, decide, guided_steps, magnitude, position, threshold)))
    reasons = {*re.findall(r'Decision\((?:True|False), "([a-z-]+)"', source), "diff-below", "diff-above"}
    reasons |= set(re.findall(r'return "([a-z-]+)"', source)) | {"final"} | {"threshold-zero", RANKS_DIFFER.reason}
    assert reasons == set(REASONS)
    assert why("a policy's own") == "a policy's own"


def test_every_reason_for_a_new_session_has_a_sentence() -> None:
    documented = (CacheStats.__doc__ or "").partition("began:")[2].partition("timesteps:")[0]
    assert set(re.findall(r'"([a-z-]+)"', documented)) == set(BEGINNINGS)


def test_candidates_state_the_error_of_each_threshold() -> None:
    found = thresholds.candidates(shadowed())
    assert [(one.threshold, one.below, one.more, one.error) for one in found] == [
        (0.0501, 1, 0, 0.3),
        (0.1, 2, 0, 0.3),  # The threshold of the run, in the place of 0.0713.
        (0.201, 3, 1, 0.9),
    ]
    assert [one.is_present for one in found] == [False, True, False]


@pytest.mark.parametrize(("threshold", "below"), [(0.01, 0), (0.5, 3)])
def test_the_threshold_of_the_run_is_a_candidate_with_its_own_value(threshold: float, below: int) -> None:
    found = thresholds.candidates(dataclasses.replace(shadowed(), thresholds=dict.fromkeys((2, 3, 4), threshold)))
    (present,) = [one for one in found if one.is_present]
    assert (present.threshold, present.below) == (threshold, below)


def test_a_threshold_far_above_the_diffs_does_not_stretch_the_axis() -> None:
    near = dataclasses.replace(shadowed(), thresholds=dict.fromkeys((2, 3, 4), 0.25))
    far = dataclasses.replace(shadowed(), thresholds=dict.fromkeys((2, 3, 4), 0.9))
    assert (largest_shown(near), largest_shown(far)) == (1.03 * 0.25, 1.03 * 0.2)
    assert "above this chart" not in diff_chart(near)
    assert "↑ threshold 0.9, above this chart" in diff_chart(far)
    assert "threshold 0.9, beyond this chart →" in scatter_chart(far)


def test_the_legend_of_a_chart_is_in_the_chart() -> None:
    assert all(f">{name}<" in diff_chart(entry()) for name in ("computed", "reused", "threshold 0.1", "diff not used"))
    assert all(f">{name}<" in error_chart(shadowed()) for name in ("would reuse", "output", "hidden_states"))
    assert ">largest error below that diff<" in scatter_chart(shadowed())
    assert all(f">{name}<" in time_chart(entry()) for name in ("computed", "reused"))


@pytest.mark.parametrize("diff", [0.0, 1e-7, 0.0999, 0.1, 0.12345, 0.9999, 1.0, 123.4])
def test_a_candidate_is_just_above_its_diff(diff: float) -> None:
    assert diff < thresholds.above(diff) <= max(1.011 * diff, 1e-6)


def test_steps_without_a_finite_diff_are_not_candidates(tmp_path: Path) -> None:
    found = entry(residual_diffs={2: float("nan"), 3: float("inf")}, errors=shadowed().errors)
    assert thresholds.candidates(found) == []
    path = cachedit_fx.inspect.RunReport("Model", Summary([found])).to_html(tmp_path / "run.html")
    assert "No step has both a diff and an error." in path.read_text(encoding="utf-8")


def test_a_step_that_compiles_does_not_dwarf_the_others() -> None:
    assert longest_shown(entry()) == 0.021
    assert longest_shown(entry(step_seconds=[])) == 0
    assert Times.of([entry()]).computed == "21.0 ms"


def test_the_verdict_counts_sessions_not_regions() -> None:
    stats = Summary(
        [entry(), entry(region="late[1:]"), entry(session="uncond"), entry(session="uncond", region="late[1:]")]
    )
    assert num_sessions(stats) == 2
    assert verdict_line(stats).startswith("8 of 20 steps in 2 sessions were reused (40%); a computed step took 21.0 ms")
    assert verdict_line([shadowed()]).startswith("Shadow mode: all steps computed; 2 of 5 in 1 session (40%)")


@pytest.mark.parametrize(
    ("seconds", "expected"), [(None, None), (2.5, "2.50 s"), (0.0123, "12.3 ms"), (2e-7, "0.20 µs")]
)
def test_a_duration_is_formatted_in_words(seconds: float | None, expected: str | None) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize("high", [0.0, 1e-9, 0.0713, 0.1, 0.99, 1.0, 7.0, 123.0, float("nan")])
def test_ticks_are_few_and_reach_the_highest_value(high: float) -> None:
    found = ticks(high)
    assert found[0] == 0 and len(found) <= 7
    assert not found[-1] < high


def test_notebooks_show_a_table_with_a_chart() -> None:
    for found in (entry(), Summary([entry()], title="Model")):
        shown = found._repr_html_()
        assert "2 of 5" in shown and "<svg" in shown and "<script" not in shown


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_are_written_and_leave_pyplot_alone(tmp_path: Path, suffix: str) -> None:
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_run([entry(), shadowed()], tmp_path / f"run.{suffix}")
    with torch.no_grad():
        text, image = tiny.prompt(), tiny.latents()
        explanation = cachedit_fx.explain(
            tiny.build(), image, encoder_hidden_states=text, timestep=torch.ones(image.shape[0])
        )
    figure = plot_chain(explanation.graphs[0], tmp_path / f"chain.{suffix}")
    assert len(figure.axes[0].patches) >= len(explanation.graphs[0].blocks) > 0
    assert all((tmp_path / f"{name}.{suffix}").stat().st_size > 1000 for name in ("run", "chain"))
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_missing_package_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    render._environment.cache_clear()
    report = cachedit_fx.inspect.RunReport("Model", Summary([entry()]))
    with pytest.raises(ConfigError, match=r"needs jinja2.*pip install cachedit_fx\[report\]"):
        report.to_html(tmp_path / "run.html")
    with pytest.raises(ConfigError, match=r"needs matplotlib.*pip install cachedit_fx\[report\]"):
        report.plot()
    assert "2 of 5" in report._repr_html_()  # This output needs neither package.
