"""A model that has no chain as a whole is cached by the submodule that holds its blocks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig, NoMatchError
from tests import hybrid
from tests.hybrid import Hybrid
from tests.researchers.port_reference import HIDDEN, PortReference
from tests.sessions import every_session
from tests.tiny import assert_bitwise

REUSED = [1, 2, 4, 5]  # Of the steps of each guidance branch.


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Blocks(nn.Module):
    """The transformer: pattern 3."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.text = nn.Linear(4, hybrid.WIDTH), nn.Linear(3, hybrid.WIDTH)
        self.blocks = nn.ModuleList(hybrid.SingleBlock() for _ in range(4))
        self.proj_out = nn.Linear(hybrid.WIDTH, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = self.proj_in(hidden_states) + self.text(encoder_hidden_states).mean(1, keepdim=True)
        for block in self.blocks:
            hidden_states = block(hidden_states, (1 + timestep)[:, None, None])
        return self.proj_out(hidden_states)


class Guided(nn.Module):
    """Calls its transformer for both guidance branches, so that each block is called twice, with unrelated streams."""

    kind: type[nn.Module] = Blocks

    def __init__(self) -> None:
        super().__init__()
        self.net = self.kind()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        cond = self.net(hidden_states, encoder_hidden_states, timestep)
        uncond = self.net(hidden_states, torch.zeros_like(encoder_hidden_states), timestep)
        return (uncond + 3 * (cond - uncond),)


class WithoutChain(hybrid.LosesText):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states, encoder_hidden_states, timestep)[0]


class GuidedWithoutChain(Guided):
    """Neither the model nor its transformer has a chain."""

    kind = WithoutChain


def config(**fields: Any) -> CacheConfig:
    return hybrid.config(**dict(residual_diff_threshold=10.0, max_continuous_cached_steps=2) | fields)


def enabled(kind: type[nn.Module] = Guided, **fields: Any) -> Any:
    return cachedit_fx.enable_cache(hybrid.build(kind), config(**fields))


def steps() -> list[dict[str, Tensor]]:
    return hybrid.moving()[:6]


def run(model: nn.Module) -> list[Tensor]:
    return [model(**call)[0] for call in steps()]


def by_hand() -> list[Tensor]:
    """Blocks 1 to 3 are skipped for each guidance branch at the reused steps."""
    model, outputs = hybrid.build(Guided), []
    net = model.net
    references = [PortReference(net, [*net.blocks], HIDDEN, 1, 0) for _ in range(2)]
    for step, call in enumerate(steps()):
        found = []
        for reference, is_cond in zip(references, (True, False), strict=True):
            text = call["encoder_hidden_states"]
            given = call | {"encoder_hidden_states": text if is_cond else torch.zeros_like(text)}
            found.append(reference.step(lambda net, given=given: net(**given), reuse=step in REUSED))
        outputs.append(found[1] + 3 * (found[0] - found[1]))
    return outputs


def test_the_submodule_is_cached_with_a_session_for_each_guidance_branch():
    model = enabled(on_no_match="raise")
    assert_bitwise(run(model), by_hand())
    assert [(stats.region, stats.num_steps, stats.cached_steps) for stats in every_session(model)] == [
        ("blocks[1:4]", 6, REUSED)
    ] * 2
    assert cachedit_fx.is_cached(model)
    calls = cachedit_fx.summary(model, logging=False).calls
    assert (calls["net"].computed, calls["net"].reused) == (4, 8)


def test_without_on_no_match_raise_the_first_call_runs_uncached(caplog: pytest.LogCaptureFixture):
    model = enabled()
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        outputs = run(model)
    assert_bitwise(outputs[:1], by_hand()[:1])
    assert [(stats.num_steps, stats.cached_steps) for stats in every_session(model)] == [(5, [1, 2, 4])] * 2
    assert caplog.records == []


def test_disable_cache_restores_the_submodule():
    model = hybrid.build(Guided)
    before = [dict(inner.__dict__) for inner in model.modules()]
    cachedit_fx.enable_cache(model, config())
    run(model)
    cachedit_fx.disable_cache(model)
    assert [inner.__dict__ for inner in model.modules()] == before


def test_another_configuration_applies_to_the_submodule():
    model = enabled()
    run(model)
    cachedit_fx.enable_cache(model, config(max_warmup_steps=6, on_no_match="raise"))
    run(model)
    assert [stats.cached_steps for stats in every_session(model)[-2:]] == [[], []]


def test_a_copy_is_cached_too():
    model = enabled(on_no_match="raise")
    run(model)
    other = copy.deepcopy(model)
    assert_bitwise(run(other), by_hand())
    assert [stats.cached_steps for stats in every_session(other)] == [REUSED] * 2


def test_explain_says_the_same():
    explanation = cachedit_fx.explain(hybrid.build(Guided), **steps()[0], cache_config=config())
    assert explanation.is_cached
    assert [(captured.module, captured.how, captured.message) for captured in explanation.modules] == [
        ("net", "whole", "")
    ]


def test_a_model_whose_submodule_has_no_chain_either_is_reported_as_a_whole(caplog: pytest.LogCaptureFixture):
    explanation = cachedit_fx.explain(hybrid.build(GuidedWithoutChain), **steps()[0], cache_config=config())
    model = enabled(GuidedWithoutChain)
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        outputs = run(model)
    assert_bitwise(outputs, run(hybrid.build(GuidedWithoutChain)))
    (record,) = caplog.records
    assert record.getMessage().startswith(explanation.modules[0].message)
    assert "net.blocks" in explanation.modules[0].reason
    assert "_cachedit_fx" not in model.net.__dict__
    with pytest.raises(NoMatchError, match=r"net\.blocks"):
        run(enabled(GuidedWithoutChain, on_no_match="raise"))


def test_a_model_that_holds_its_blocks_itself_is_not_divided():
    model = enabled(hybrid.LosesText)
    for _ in range(2):
        model(**steps()[0])
    assert not any("_cachedit_fx" in inner.__dict__ for inner in model.modules() if inner is not model)
    assert isinstance(model, Hybrid)
