"""The references of the zoo's tests: blocks that are skipped by hand, and the models themselves."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import VARIANTS
from tests.zoo.runs import cuts_of, every_variant
from tests.zoo.variant import Cut, Variant
from tests.zoo.variant_reference import VariantReference

# The innermost cut: the blocks that it skips are also skipped by the other cuts.
CASES = {f"{v.name}-F{cut[0]}B{cut[1]}": (v, cut) for v in VARIANTS.values() for cut in cuts_of(v)[-1:]}


@pytest.mark.parametrize(("variant", "cut"), CASES.values(), ids=CASES)
def test_a_reused_step_by_hand_equals_the_computed_one_for_equal_inputs(variant: Variant, cut: Cut):
    call, *_ = variant.generation()
    by_hand = VariantReference(variant, variant.build(), *cut)
    with torch.no_grad():
        computed = by_hand(skip=False, **call)
        # a + (b - a) replaces b, in float32 at values around 1, and the blocks that follow propagate the rounding.
        torch.testing.assert_close(by_hand(skip=True, **call), computed, rtol=0, atol=5e-6)


@every_variant
def test_a_variant_is_deterministic_and_its_steps_differ(variant: Variant):
    model, again = variant.build(), variant.build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert len(variant.chain(model)) == variant.num_blocks
    assert all(parameter.any() for parameter in model.parameters() if parameter.numel() > 1)
    before, after, *_ = variant.generation()
    changing = {*variant.latents, *variant.times}
    assert {name for name in before if before[name] is not after[name]} == changing
