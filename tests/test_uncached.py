"""Calls that cannot be cached run as without the backend, and the reason is logged."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from tests import tiny
from tests.messages import flat
from tests.sessions import every_session
from tests.tiny import TIMES, build, compiled, frozen, generate, latents, prompt, ran_blocks, step

ALL = tiny.NUM_BLOCKS
FIRST = 1


def expected(model, text, noise, times=TIMES, **fields):
    return [record.output for record in tiny.reference(model, text, noise, times, **fields).records]


UNCACHED = [
    pytest.param(
        lambda: build().train(), {}, ["training: expected: a module in eval mode", "call .eval()"], id="training"
    ),
    pytest.param(lambda: build().requires_grad_(True), {}, ["gradients: ", "torch.no_grad()"], id="gradients"),
    pytest.param(build, {"Fn_compute_blocks": 4}, ["too-few-blocks: ", "< 4, ", "found: 4 + 0"], id="Fn-takes-all"),
    pytest.param(
        build,
        {"Fn_compute_blocks": 2, "Bn_compute_blocks": 2},
        ["too-few-blocks: ", "Fn_compute_blocks + Bn_compute_blocks < 4", "of blocks; found: 2 + 2"],
        id="Fn-and-Bn-take-all",
    ),
    pytest.param(
        lambda: frozen(tiny.Plain()),
        {},
        ["no-chain: ", "found: no list of blocks", "TORCH_LOGS=graph_breaks"],
        id="no-chain",
    ),
]


@pytest.mark.parametrize(("make", "fields", "expected_words"), UNCACHED)
def test_a_model_that_cannot_be_cached_runs_uncached_with_one_warning(make, fields, expected_words, caplog):
    model, text, noise = make(), prompt(), latents()
    module = compiled(model, dynamic=False, **fields)
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        outputs = generate(module, text, noise)
        step(module, text, 1.0, latents(1, tokens=9))  # Another graph with the same reason.
    tiny.assert_bitwise(outputs, generate(model, text, noise))
    assert not cachedit_fx.is_cached(module)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "cachedit" in r.name]
    for words in ["runs without caching", *expected_words, 'options={"on_no_match": "raise"}']:
        assert words in flat(warning)


@pytest.mark.parametrize(("make", "fields", "expected_words"), UNCACHED)
def test_a_model_that_cannot_be_cached_raises_with_on_no_match_raise(make, fields, expected_words):
    module = compiled(make(), on_no_match="raise", **fields)
    with pytest.raises(BackendCompilerFailed) as caught:
        step(module, prompt(), 1.0, latents())
    assert isinstance(caught.value.inner_exception, cachedit_fx.NoMatchError)
    assert all(words in flat(str(caught.value)) for words in expected_words)


def test_a_call_that_needs_gradients_runs_uncached_and_the_session_continues():
    model, text, noise = build().requires_grad_(True), prompt(), latents()
    module = compiled(model)
    with torch.no_grad():
        ran = [ran_blocks(module, text, timestep, noise) for timestep in TIMES[:2]]
    step(module, text, TIMES[2], noise).sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks[2].image.parameters())
    with torch.no_grad():
        ran += [ran_blocks(module, text, timestep, noise) for timestep in TIMES[2:4]]
    assert ran == [ALL, FIRST, ALL, FIRST]
    assert every_session(module)[0].num_steps == 4


def test_training_mode_after_compilation_stops_the_cache():
    class Dropping(tiny.Transformer):
        """A model with a dropout, whose graph depends on the training mode."""

        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, hidden_states, encoder_hidden_states, timestep):
            return super().forward(self.dropout(hidden_states), encoder_hidden_states, timestep)

    model, text, noise = frozen(Dropping()), prompt(), latents()
    module = compiled(model)
    step(module, text, TIMES[0], noise)
    model.train()
    assert ran_blocks(module, text, TIMES[1], noise) == ALL
    model.eval()
    assert ran_blocks(module, text, TIMES[1], noise) == FIRST


def test_the_rest_of_a_chain_after_a_graph_break_runs_uncached():
    model, text, noise = frozen(tiny.TwoLists(broken=True)), prompt(), latents()
    module = torch.compile(model, backend=cachedit_fx.Backend(tiny.config()))
    tiny.assert_bitwise(generate(module, text, noise), generate(model, text, noise))
    assert not cachedit_fx.is_cached(module)


def test_a_graph_whose_pieces_do_not_compile_runs_as_a_whole(caplog, monkeypatch):
    def fail(self, piece):
        raise RuntimeError("expected [u24, u23] to have been codegen-ed")

    monkeypatch.setattr(InnerCompiler, "compile_piece", fail)
    model, text, noise = build(), prompt(), latents()
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        module = compiled(model)
        outputs = generate(module, text, noise)
    tiny.assert_bitwise(outputs, generate(model, text, noise))
    assert not cachedit_fx.is_cached(module)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "cachedit" in r.name]
    assert "the inner backend failed on a part of the graph (RuntimeError: expected [u24, u23]" in warning
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        step(compiled(build(), on_no_match="raise"), text, 1.0, noise)
    assert isinstance(caught.value.inner_exception, cachedit_fx.errors.PassError)
