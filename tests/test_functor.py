"""Patch functors make a model fit a template that did not fit it, and the model can be restored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import cachedit_fx
from cachedit_fx import NoMatchError
from cachedit_fx.errors import PatternError
from cachedit_fx.functors import PatchFunctor, split_stream
from tests import hybrid
from tests.hybrid import calls, generate
from tests.messages import flat
from tests.odd_models import (
    CASES,
    ENCODER,
    HIDDEN,
    THRESHOLD,
    TWO_STREAMS,
    Case,
    Joint,
    JointBlock,
    Model,
    build,
    by_hand,
    named,
)
from tests.sessions import every_session
from tests.tiny import TEXT, TIMES, TOKENS, assert_bitwise, latents


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def config(**fields: Any) -> cachedit_fx.CacheConfig:
    return hybrid.config(**dict(residual_diff_threshold=THRESHOLD, on_no_match="raise") | fields)


def refusal(case: Case) -> str:
    """The message of the error without the functor."""
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, None), config())
    with pytest.raises((NoMatchError, PatternError)) as caught:
        generate(model)
    assert type(caught.value) is (NoMatchError if case.template is None else PatternError)
    return str(caught.value)


def test_the_model_does_not_match_without_its_functor(case):
    assert case.mismatch in flat(refusal(case))


def test_a_stream_that_the_last_block_loses_is_reported_as_lost():
    assert "no output of block 3 has the same shape as any of its inputs" in refusal(CASES["give_to_block"])


def test_with_its_functor_the_model_matches_and_computed_steps_are_bitwise_equal(case):
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config(residual_diff_threshold=0.0))
    assert_bitwise(generate(model), generate(build(case)))
    (stats,) = every_session(model)
    assert stats.region == "blocks[1:4]"


def test_reused_steps_are_bitwise_those_of_a_reference_written_by_hand(case):
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config())
    outputs = generate(model)
    expected, reused = by_hand(case, calls())
    assert_bitwise(outputs, expected)
    (stats,) = every_session(model)
    assert stats.cached_steps == reused == [1, 3, 5, 7]


def test_disable_cache_restores_the_model(case):
    model = build(case)
    before = [dict(module.__dict__) for module in model.modules()]
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config())
    generate(model)
    cachedit_fx.disable_cache(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert_bitwise(generate(model), generate(build(case)))


def test_compiling_blocks_inline_gives_the_same_outputs(case):
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config(compile_blocks="inline"))
    assert_bitwise(generate(model), by_hand(case, calls())[0])


def test_a_stream_that_was_split_off_may_be_cached_as_a_value():
    kept_text = dataclasses.replace(TWO_STREAMS, cached={ENCODER: "value"})
    case = dataclasses.replace(CASES["split_stream"], template=kept_text)
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config())
    outputs = generate(model)
    expected, reused = by_hand(case, calls(), {ENCODER: "value"})
    assert every_session(model)[0].cached_steps == reused
    assert_bitwise(outputs, expected)


def grown(given: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same calls with a larger image."""
    image = latents(tokens=TOKENS + 3)
    return [call | {HIDDEN: image} for call in given]


@pytest.mark.parametrize(
    "name",
    [
        "give_to_block",
        "rename_stream",
        pytest.param("split_stream", marks=pytest.mark.filterwarnings("ignore:Raw SymInt value")),
    ],
)
def test_another_size_is_cached(name):
    case = CASES[name]
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config())
    generate(model)
    given = grown(calls())
    outputs = [model(**call)[0] for call in given]
    expected, reused = by_hand(case, given)
    assert every_session(model)[-1].cached_steps == reused
    assert_bitwise(outputs, expected)


@pytest.mark.filterwarnings("ignore:Raw SymInt value")
def test_a_stream_whose_length_was_rounded_up_can_be_split():
    class Padded(Joint):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
            scale = (1 + timestep)[:, None, None]
            image = self.proj_in(hidden_states)
            image = torch.nn.functional.pad(image, (0, 0, 0, -image.shape[1] % 4))
            joint = torch.cat([self.proj_text(encoder_hidden_states), image], dim=1)
            for block in self.blocks:
                joint = block(joint, scale)
            return (self.proj_out(joint[:, encoder_hidden_states.shape[1] :]),)

    case = dataclasses.replace(CASES["split_stream"], model=Padded)
    model, plain = build(case), build(case)
    cachedit_fx.enable_cache(case.adapter(model, case.functor()), config(residual_diff_threshold=0.0))
    for given in (calls(), grown(calls())):
        assert_bitwise([model(**call)[0] for call in given], [plain(**call)[0] for call in given])


def test_work_between_blocks_that_undoes_a_layout_needs_no_functor():
    """After every second block the stream is converted to columns and back to rows."""

    class Turns(Model):
        block = JointBlock

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
            scale = (1 + timestep)[:, None, None]
            hidden_states = self.proj_in(hidden_states) + self.proj_text(encoder_hidden_states).mean(1, keepdim=True)
            for i, block in enumerate(self.blocks):
                hidden_states = block(hidden_states, scale)
                if i % 2 == 0:
                    hidden_states = hidden_states.transpose(1, 2).contiguous().transpose(1, 2)
            return (self.proj_out(hidden_states),)

    model = hybrid.build(Turns)
    cachedit_fx.enable_cache(model, config())
    assert_bitwise(generate(model, TIMES[:1]), generate(hybrid.build(Turns), TIMES[:1]))
    assert every_session(model)[0].region == "blocks[1:4]"


def test_split_stream_returns_slices_with_their_names_and_sizes():
    found = []

    class Look(PatchFunctor):
        def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
            for joint in named(gm, "joint"):
                (reader, *_) = joint.users
                parts = split_stream(joint, (TEXT, TOKENS), 1, (ENCODER, HIDDEN))
                (whole,) = parts[0].users
                found.append((joint, reader, parts, whole))
            return gm

    case = CASES["split_stream"]
    model = build(case)
    cachedit_fx.enable_cache(case.adapter(model, Look()), config())
    generate(model, TIMES[:1])
    joint, reader, parts, whole = found[1]
    assert [part.meta["cachedit_name"] for part in parts] == [ENCODER, HIDDEN]
    assert [part.meta["example_value"].shape[1] for part in parts] == [TEXT, TOKENS]
    assert set(joint.users) == set(parts)
    assert all(set(part.users) == {whole} for part in parts)
    assert whole in reader.all_input_nodes
    assert whole.meta["example_value"].shape == joint.meta["example_value"].shape
    for node, owner in ((whole, reader), (parts[0], joint), (parts[1], joint)):
        assert node.meta["nn_module_stack"] == owner.meta["nn_module_stack"]
