"""A copy of an enabled module is enabled with the same settings and shares nothing with the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cachedit_fx
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import ALL_REUSED, Guided, called, counts, enabled, run, warnings_in
from tests.tiny import build, compiled, config, frozen, latents, prompt
from tests.tiny_pipelines import PIPELINES


@pytest.fixture
def new_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: warnings_in(caplog)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved])


@COPIES
def test_a_copy_is_enabled_with_the_same_settings_and_shares_nothing(make_copy, new_warnings):
    model = enabled()
    run(model)
    copied = make_copy(model)
    assert counts(copied) == CallCounts() and not cachedit_fx.is_cached(copied)
    expected = tiny.reference(build(), prompt(2), latents(2))
    tiny.assert_bitwise(run(copied, seed=2), [record.output for record in expected.records])
    assert counts(copied) == counts(model) == CallCounts(computed=4, reused=4)
    cachedit_fx.refresh_context(copied, **ALL_REUSED)
    run(copied)
    assert counts(copied) == CallCounts(computed=5, reused=11)
    run(model)
    assert counts(model) == CallCounts(computed=8, reused=8)
    cachedit_fx.disable_cache(copied)
    assert vars(copied).keys() == vars(build()).keys()
    assert cachedit_fx.is_cached(model) and not cachedit_fx.is_cached(copied)
    assert new_warnings() == []


@COPIES
def test_a_copy_of_a_module_with_hooks_of_diffusers_is_disabled_without_a_trace(make_copy):
    flux = PIPELINES["flux"]
    pipe, other = flux.build(2), flux.build(2)
    keys = {*vars(pipe.transformer)}
    cachedit_fx.enable_cache(pipe, **tiny.fields(**ALL_REUSED, inner_backend="eager"))
    other.transformer = make_copy(pipe.transformer)
    tiny.assert_bitwise([flux.run(other, num_steps=4)], [flux.run(pipe, num_steps=4)])
    (stats,) = cachedit_fx.summary(other, logging=False)
    assert (stats.session, stats.cached_steps, stats.state_bytes) == ("cond", [1, 2, 3], 0)
    cachedit_fx.disable_cache(other)
    assert {*vars(other.transformer)} == keys


@COPIES
def test_a_copy_of_a_cached_method_is_cached(make_copy):
    model = cachedit_fx.enable_cache(frozen(Guided()), config(), method="decode")
    copied = make_copy(model)
    called(copied, "decode")
    assert counts(copied) == CallCounts(computed=4, reused=4)
    assert counts(model) == CallCounts()


@COPIES
def test_a_copy_of_a_model_that_was_compiled_with_the_backend_is_cached_and_shares_nothing(make_copy):
    model = compiled(build())
    run(model)
    copied = make_copy(model)
    assert cachedit_fx.summary(copied, logging=False) == []
    expected = tiny.reference(build(), prompt(2), latents(2))
    tiny.assert_bitwise(run(copied, seed=2), [record.output for record in expected.records])
    (stats,) = cachedit_fx.summary(copied, logging=False)
    assert stats.cached_steps == [1, 3, 5, 7]


class Locked:
    """A decider that can neither be copied nor pickled."""

    def __init__(self) -> None:
        self.made = (number for number in range(3))

    def decide(self, _step: object) -> None:
        return None


@COPIES
@pytest.mark.parametrize("method", [None, "decode"])
def test_a_copy_that_cannot_copy_the_settings_runs_without_the_cache_and_warns(make_copy, method, new_warnings):
    model = cachedit_fx.enable_cache(frozen(Guided()), config(decider=Locked()), method=method)
    copied = make_copy(model)
    (warning,) = new_warnings()
    assert "a copy of this Guided has no cache" in warning and "call enable_cache for the copy" in warning
    tiny.assert_bitwise(called(copied, "decode"), called(model if method is None else copied, "decode"))
    assert not cachedit_fx.is_cached(copied) and cachedit_fx.summary(copied, logging=False).calls == {}
    enabled(copied)
    run(copied)
    assert counts(copied) == CallCounts(computed=4, reused=4)
