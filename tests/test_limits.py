"""Dynamo limits the recompilations of a function. Graphs that are reused raise the limit; a call past it warns."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.frontend import capture_strategies
from tests import tiny
from tests.fast_dispatches import enabled
from tests.sessions import every_session
from tests.tiny import TIMES, build, frozen, latents, prompt

LIMIT = 2
REUSED = [1, 3, 5, 7]


@pytest.fixture(autouse=True)
def few_compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        capture_strategies, "_graphs", weakref.WeakKeyDictionary()
    )  # Graphs of other tests may still be alive.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


class ReadsLengths(tiny.Transformer):
    """Reads lengths from the device and hashes them: Dynamo captures it in parts, and the blocks once per length."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        lengths = encoder_hidden_states.isfinite()[..., 0].sum(1).tolist()
        if len(set(lengths)) > 1:
            raise ValueError("all prompts have to be of one length")
        return super().forward(hidden_states, encoder_hidden_states, timestep)


class Named(tiny.Transformer):
    """Specialised on a string argument: every value gets a separate graph."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, name: str = ""
    ) -> tuple[Tensor, ...]:
        (output,) = super().forward(hidden_states, encoder_hidden_states, timestep)
        return (output + len(name),)


def call(module: nn.Module, text: Tensor, timestep: float, name: str) -> Tensor:
    times = torch.full((tiny.BATCH,), timestep)
    output: Tensor = module(latents(), text, times, name)[0]
    return output


def with_another_name_at_every_step(module: nn.Module, text: Tensor, times: Sequence[float] = TIMES) -> list[Tensor]:
    """A generation whose steps make a second call with a new name each, which requires a new graph every time."""
    outputs = []
    for number, timestep in enumerate(times):
        outputs += [call(module, text, timestep, ""), call(module, text, timestep, "x" * (number + 1))]
    return outputs


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("cachedit")]


@pytest.mark.parametrize("lengths", [range(5, 5 + 3 * LIMIT)], ids=["three-times-the-limit"])
@pytest.mark.parametrize(
    ("cls", "others"),
    [(tiny.Transformer, dict(dynamic=False)), (ReadsLengths, {})],
    ids=["whole", "in-parts"],
)
def test_lengths_that_are_used_repeatedly_stay_cached(cls: type[tiny.Transformer], others: Any, lengths: range):
    module = enabled(frozen(cls()), **others)
    for length in lengths:
        tiny.generate(module, prompt(length=length), latents())
    assert [stats.cached_steps for stats in every_session(module)] == [REUSED] * len(lengths)


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(capture_strategies, "MAX_GRAPHS", LIMIT + 1)
    module = enabled(build(), dynamic=False)
    for length in range(5, 10):
        tiny.generate(module, prompt(length=length), latents())
    assert [stats.cached_steps for stats in every_session(module)] == [REUSED] * (LIMIT + 1)
    (warning,) = warnings_in(caplog)
    assert f"at most {LIMIT + 1} graphs" in warning


@pytest.mark.parametrize("fast_dispatch", [True, False])
def test_past_the_limit_a_call_runs_uncached_and_warns_once(fast_dispatch: bool, caplog: pytest.LogCaptureFixture):
    model, text = frozen(Named()), prompt()
    expected = with_another_name_at_every_step(model, text)
    module = enabled(model, fast_dispatch=fast_dispatch)
    outputs = with_another_name_at_every_step(module, text)
    first = every_session(module)[0]
    # The graph that is already compiled is still cached, although other calls are not.
    assert (first.num_steps, first.cached_steps) == (8, REUSED)
    computed = [i for i in range(8) if i not in REUSED]
    tiny.assert_bitwise([outputs[2 * i] for i in computed], [expected[2 * i] for i in computed])
    tiny.assert_bitwise(outputs[-5::2], expected[-5::2])  # These calls had no graph.
    (warning,) = warnings_in(caplog)
    for words in (
        "Named runs without caching if a call needs another graph",
        "recompile_limit",
        "TORCH_LOGS=recompiles",
        'options={"on_no_match": "raise"}',
    ):
        assert words in warning


@pytest.mark.parametrize("cls", [Named, pytest.param("parts", id="in-parts")])
def test_past_the_limit_a_call_raises_with_on_no_match_raise(cls: Any):
    text = prompt()
    if cls is Named:
        module = enabled(frozen(Named()), on_no_match="raise")
        with pytest.raises(cachedit_fx.NoMatchError, match="runs without caching if a call needs another graph"):
            with_another_name_at_every_step(module, text)
        return
    module = enabled(frozen(ReadsLengths()), on_no_match="raise")
    with pytest.raises(cachedit_fx.NoMatchError, match="runs without caching if a call needs another graph"):
        for length in range(5, 12):  # Each length is used once, so no graph raises the limit.
            tiny.step(module, prompt(length=length), 1.0, latents())


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_class_that_exceeded_the_limit_before_runs_uncached(fullgraph: bool, caplog: pytest.LogCaptureFixture):
    """Dynamo does not compile the code of such a class any more, for any caller."""
    model, text = frozen(Named()), prompt()
    plain = torch.compile(model, backend="eager")
    for number in range(LIMIT + 1):
        call(plain, text, 1.0, "y" * number)
    module = enabled(frozen(Named()), fullgraph=fullgraph)
    expected = [call(module.forward, text, timestep, "") for timestep in TIMES]
    tiny.assert_bitwise([call(module, text, timestep, "") for timestep in TIMES], expected)
    (warning,) = warnings_in(caplog)
    assert "Named runs without caching if a call needs another graph" in warning


def test_a_higher_limit_of_the_user_is_respected():
    module, text = enabled(frozen(Named())), prompt()
    with torch._dynamo.config.patch(recompile_limit=20):
        with_another_name_at_every_step(module, text)
    assert [stats.num_steps for stats in every_session(module)] == [8, 8]


def test_the_recompile_limit_option_is_respected(caplog: pytest.LogCaptureFixture):
    module = enabled(build(), dynamic=False, recompile_limit=1)
    for length in (5, 6):
        tiny.generate(module, prompt(length=length), latents())
    assert [stats.cached_steps for stats in every_session(module)] == [REUSED]
    (warning,) = warnings_in(caplog)
    assert "at most 1 graph for" in warning


def test_an_uncached_call_counts_among_the_calls_of_its_step():
    """The next call does not take its ordinal, and does not reuse a value that it stored while it was compiled."""

    def generation(module: nn.Module, *, has_another: bool) -> list[Tensor]:
        outputs = []
        for number, timestep in enumerate(TIMES):
            times = torch.full((tiny.BATCH,), timestep)
            if has_another:  # A call with other latents, which needs a new graph.
                module(latents(2), text, times, "x" * (number + 1))
            outputs.append(module(latents(1), text, times, "")[0])
        return outputs

    text = prompt()
    model = frozen(Named())
    module = enabled(model, residual_diff_threshold=1.0)
    expected = generation(module, has_another=False)
    cachedit_fx.reset()
    tiny.assert_bitwise(generation(module, has_another=True), expected)
    assert [stats.num_steps for stats in every_session(module)] == [2, len(TIMES)]
