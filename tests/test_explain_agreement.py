"""`explain` and `enable_cache` agree on what becomes of a model: the same verdict, with the same message."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig
from cachedit_fx.inspect import Explanation
from tests import hybrid, odd_models, original_wan, tiny
from tests.researchers.case import Case
from tests.researchers.cases import CASES
from tests.researchers.port_reference import build
from tests.tiny_pipelines import PIPELINES

CONFIG = CacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1.0, forecaster=None, inner_backend="eager"
)
ADVICE = '\nMake this an error: options={"on_no_match": "raise"}'
# The models that are cached or refused for other reasons are in tests/test_researchers.py.
NAMES = ["dit-getattr-of-numbered-names", "dit-blocks-disabled", "dit-branch-and-residual", "video-folded"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Recorded(Exception):
    """Stops a call whose arguments were recorded."""


def arguments_of(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of a generation."""
    model, found = build(case.model), []

    def record(*args: Any, **kwargs: Any) -> None:
        found.append((args, kwargs))
        raise Recorded

    model.__dict__["_compiled_call_impl"] = record
    with pytest.raises(Recorded):
        case.calls()[0](model)
    return found[0]


def outcome_of(model: nn.Module, call: Callable[[], object], caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """What `enable_cache` reports at the end of as many calls as it tries: the message and the last reason."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        for _ in range(3):
            call()
    messages = [record.getMessage() for record in caplog.records if record.name == "cachedit_fx.frontend.uncached"]
    assert len(messages) == (not cachedit_fx.is_cached(model))
    (counts,) = cachedit_fx.summary(model, logging=False).calls.values()
    return "".join(messages).removesuffix(ADVICE), [*counts.reasons, ""][0]


def comparable(text: str) -> str:
    """A message without what may differ between two captures of one model by Dynamo.

    The number of graphs depends on the sizes that it has seen before, and the place in the code of a hook on what it
    has given up on before.
    """
    text = re.sub(r"captured \d+ graphs", "captured several graphs", text)
    return re.sub(r" \(the first graph ends at hooks\.py:.*\)", "", text)


def agree(
    explanation: Explanation, model: nn.Module, call: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    message, reason = outcome_of(model, call, caplog)
    (captured,) = explanation.modules
    assert comparable(captured.message) == comparable(message)
    assert explanation.is_cached == cachedit_fx.is_cached(model)
    if not explanation.is_cached:
        assert comparable(captured.reason) == comparable(reason)
        assert captured.cure in message
        assert captured.cure in str(explanation)


def agree_on(
    model: Any, given: tuple[tuple[Any, ...], dict[str, Any]], caplog: pytest.LogCaptureFixture, **enable: Any
) -> None:
    """Compares both, in both orders: `explain` of the plain model, and of the enabled model after its calls.

    What Dynamo gave up on remains skipped, so that it may end a graph elsewhere; hence the resets.
    """
    args, kwargs = given
    before = cachedit_fx.explain(model, *args, cache_config=CONFIG, **kwargs)
    torch._dynamo.reset()
    module = model.transformer if isinstance(model, BlockAdapter) else model
    cachedit_fx.enable_cache(model, CONFIG, **enable)
    agree(before, module, lambda: module(*args, **kwargs), caplog)
    if not before.is_cached:
        torch._dynamo.reset()
    after = cachedit_fx.explain(module, *args, **kwargs)
    assert after.is_cached == before.is_cached
    assert comparable(after.modules[0].message) == comparable(before.modules[0].message)


@pytest.mark.parametrize("name", NAMES)
def test_they_agree_on_a_model_without_special_support(name: str, caplog: pytest.LogCaptureFixture):
    case = CASES[name]
    agree_on(build(case.model), arguments_of(case), caplog)


@pytest.mark.parametrize("name", ["rename_stream"])
def test_they_agree_on_a_model_that_needs_a_functor(name: str, caplog: pytest.LogCaptureFixture):
    agree_on(odd_models.build(odd_models.CASES[name]), ((), hybrid.calls()[0]), caplog)


def test_they_agree_on_a_model_with_a_functor(caplog: pytest.LogCaptureFixture):
    model: Any = hybrid.build(original_wan.Wan)
    functor = original_wan.WanPatchFunctor()
    agree_on(BlockAdapter(transformer=model, patch_functor=functor), ((), original_wan.calls()[0]), caplog)
    cachedit_fx.disable_cache(model)


class Disabled(hybrid.Hybrid):
    """Dynamo runs no graph of it."""

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def hooked(model: nn.Module) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: hybrid.build(Disabled),
        lambda: hooked(hybrid.build()),
        lambda: hybrid.build().train(),
        lambda: tiny.frozen(tiny.Plain()),
    ],
    ids=["disabled", "offloaded", "training", "no-blocks"],
)
def test_they_agree_on_a_model_in_an_unusual_state(make: Callable[[], Any], caplog: pytest.LogCaptureFixture):
    agree_on(make(), ((), hybrid.calls()[0]), caplog)


def test_they_agree_if_a_cache_of_diffusers_is_enabled_afterwards(caplog: pytest.LogCaptureFixture, tmp_path: Any):
    pipe = PIPELINES["flux"].build()
    model, calls = pipe.transformer, []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    PIPELINES["flux"].run(pipe, num_steps=1)
    hook.remove()
    cachedit_fx.enable_cache(model, CONFIG)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    (args, kwargs) = calls[0]

    def call() -> None:
        with model.cache_context("cond"):
            model(*args, **kwargs)

    explanation = cachedit_fx.explain(model, *args, **kwargs)
    agree(explanation, model, call, caplog)
    assert explanation.graphs == ()
    assert "a cache of diffusers is also enabled for it" in explanation.to_html(tmp_path / "page.html").read_text()


class Guided(hybrid.Hybrid):
    """A sampler calls `forward_with_cfg`. Only this method, which runs the blocks itself, has a break."""

    def forward_with_cfg(self, hidden_states: Any, encoder_hidden_states: Any, timestep: Any) -> Any:
        torch._dynamo.graph_break()
        return self.forward(hidden_states, encoder_hidden_states, timestep)


def test_explain_explains_the_method_that_is_cached(caplog: pytest.LogCaptureFixture):
    model: Any = hybrid.build(Guided)
    cachedit_fx.enable_cache(model, CONFIG, method="forward_with_cfg")
    given = hybrid.calls()[0]
    explanation = cachedit_fx.explain(model, **given)
    agree(explanation, model, lambda: model.forward_with_cfg(**given), caplog)
    assert "in parts" in explanation.modules[0].how
