"""Names of inputs are classified in the same way, regardless of what Dynamo or the author of a model adds to them."""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from cachedit_fx.patterns.names import (
    CONDITIONING_WORDS,
    REBUILT_WORDS,
    TIMESTEP_NAMES,
    conditioning_names,
    is_conditioning_name,
    is_rebuilt_name,
    timestep_name,
    without_number,
)
from cachedit_fx.patterns.nodes import base_name

timesteps = st.one_of(*(st.from_regex(pattern, fullmatch=True) for pattern in TIMESTEP_NAMES)).filter(str.isascii)
conditionings = st.sampled_from(CONDITIONING_WORDS)
rebuilts = st.sampled_from([word.rstrip("$") for word in REBUILT_WORDS])
# Letters that form no word of a table, next to any other text.
fillers = st.text("qvwj", max_size=4)
numbers = st.integers(0, 10**4)


@given(st.one_of(timesteps, conditionings, rebuilts), numbers)
def test_the_number_that_dynamo_appends_changes_no_classification(name, number):
    node = fx.Graph().placeholder(f"{name}_{number}")
    assert base_name(node) == without_number(f"{name}_{number}") == name
    assert timestep_name([base_name(node)]) == timestep_name([name])
    assert is_conditioning_name(f"{name}_{number}") == is_conditioning_name(name)


@given(timesteps)
def test_a_timestep_is_found_by_its_whole_name(name):
    assert timestep_name([name]) == name
    assert timestep_name([f"{name}_proj"]) is None  # A projection of the timestep.


@given(st.lists(timesteps, min_size=1, max_size=4, unique=True).flatmap(lambda names: st.tuples(
    st.just(names), st.permutations([*names, "hidden_states", "encoder_hidden_states", "guidance"])
)))  # fmt: skip
def test_among_several_timesteps_the_first_kind_in_the_table_is_chosen(case):
    names, arguments = case
    found = timestep_name(arguments)
    kinds = [next(i for i in range(len(TIMESTEP_NAMES)) if is_of_kind(name, i)) for name in names]
    assert found in names and kinds[names.index(found)] == min(kinds)


def is_of_kind(name: str, kind: int) -> bool:
    return re.fullmatch(TIMESTEP_NAMES[kind], name) is not None


@given(fillers, conditionings, fillers, st.booleans())
def test_a_conditioning_word_is_found_anywhere_in_a_name(before, word, after, is_upper):
    name = f"{before}{word}{after}"
    name = name.upper() if is_upper else name
    assert is_conditioning_name(name) and conditioning_names([name]) == (name,)


@given(fillers, conditionings, rebuilts)
def test_a_value_that_loops_rebuild_is_not_a_conditioning_even_if_its_name_contains_one(filler, word, rebuilt):
    name = f"{filler}{word}_{rebuilt}"
    assert is_rebuilt_name(name) and conditioning_names([name, word]) == (word,)


@given(st.one_of(timesteps, fillers.map(lambda text: f"{text}_timestep")))
def test_no_name_is_both_a_timestep_and_a_conditioning(name):
    assert timestep_name([name]) is None or not conditioning_names([name])


@given(fillers)
def test_a_name_without_a_word_from_the_tables_is_not_classified(name):
    assert timestep_name([name]) is None and not is_conditioning_name(name) and not is_rebuilt_name(name)


@pytest.mark.parametrize(
    ("model", "timestep", "conditioning"),
    [
        ("FluxTransformer2DModel", "timestep", {"encoder_hidden_states"}),
        ("QwenImageTransformer2DModel", "timestep", {"encoder_hidden_states"}),
        ("WanTransformer3DModel", "timestep", {"encoder_hidden_states"}),
        ("DiTTransformer2DModel", "timestep", {"class_labels"}),
        ("ZImageTransformer2DModel", "t", {"cap_feats"}),
        ("StableAudioDiTModel", "timestep", {"encoder_hidden_states"}),
    ],
)
def test_the_arguments_of_diffusers_models_are_classified(model, timestep, conditioning):
    arguments = inspect.signature(getattr(diffusers, model).forward).parameters
    assert timestep_name(arguments) == timestep
    assert conditioning <= {*conditioning_names(arguments)}
