"""Methods of a model that bypass the cache cause a warning, and can be cached by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx import NoMatchError
from cachedit_fx.frontend.entry_points import entry_points
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import CALLS, Guided, called, counts, enabled, warnings_in
from tests.sessions import every_session
from tests.tiny import build, config, frozen, generate, latents, prompt

METHODS = pytest.mark.parametrize("method", ["forward_with_cfg", "decode"])


@pytest.fixture
def new_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: warnings_in(caplog)


@METHODS
def test_a_method_that_bypasses_the_cache_warns_once_and_is_counted(method, new_warnings):
    model = enabled(frozen(Guided()))
    for _ in range(2):
        outputs = called(model, method)
    (warning,) = new_warnings()
    assert f"Guided.{method} runs without caching" in warning and f'enable_cache(model, method="{method}")' in warning
    assert (counts(model).bypassed, counts(model).total) == (2 * CALLS, 2 * CALLS)
    cachedit_fx.disable_cache(model)
    assert method not in vars(model)
    tiny.assert_bitwise(called(model, method), outputs)


@METHODS
def test_a_method_that_bypasses_the_cache_raises_an_error_on_request(method):
    model = enabled(frozen(Guided()), on_no_match="raise")
    with pytest.raises(NoMatchError, match=f"Guided.{method} runs without caching"):
        called(model, method)


def test_methods_that_do_not_bypass_the_cache_cause_no_warning(new_warnings):
    model = enabled(frozen(Guided()))
    called(model, "by_call")
    assert model.num_weights(torch.ones(2)) == 8
    assert new_warnings() == []
    assert counts(model) == CallCounts(computed=4, reused=4)


def test_entry_points_are_methods_that_the_forward_does_not_reach():
    class Split(tiny.Transformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.features(*args, **kwargs)

        def features(self, *args: Any, **kwargs: Any) -> Any:
            return tiny.Transformer.forward(self, *args, **kwargs)

    assert entry_points(build()) == entry_points(Split()) == []
    assert entry_points(Guided()) == ["forward_with_cfg", "decode", "by_call", "num_weights"]


@METHODS
def test_a_method_is_cached_by_its_name(method, new_warnings):
    plain, model = frozen(Guided()), frozen(Guided())
    model.load_state_dict(plain.state_dict())
    before = dict(vars(model))
    cachedit_fx.enable_cache(model, config(residual_diff_threshold=0.0), method=method)
    tiny.assert_bitwise(called(model, method), called(plain, method))
    cachedit_fx.enable_cache(model, config(), method=method)
    called(model, method)
    assert every_session(model)[-1].cached_steps == [1, 3, 5, 7]
    assert cachedit_fx.is_cached(model) and new_warnings() == []
    assert counts(model) == CallCounts(computed=CALLS + 4, reused=4)
    cachedit_fx.disable_cache(model)
    assert vars(model) == before


def test_the_forward_can_be_cached_as_a_method_for_samplers_that_call_it():
    model = cachedit_fx.enable_cache(build(), config(), method="forward")
    with torch.no_grad():
        outputs = generate(model.forward, prompt(), latents())
    expected = tiny.reference(build(), prompt(), latents())
    tiny.assert_bitwise(outputs, [record.output for record in expected.records])
    assert counts(model) == CallCounts(computed=4, reused=4)


def test_a_method_that_the_user_compiles_is_one_graph():
    model = enabled(frozen(Guided()))
    compiled = torch.compile(model.decode, backend="eager", fullgraph=True)
    with torch.no_grad():
        outputs = generate(compiled, prompt(), latents())
    tiny.assert_bitwise(outputs, called(model, "decode"))
