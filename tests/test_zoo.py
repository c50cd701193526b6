"""All transformers of the zoo, of all image sizes and text lengths: cached with the bare backend, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.zoo import VARIANTS
from tests.zoo.by_hand import ByHand
from tests.zoo.runs import SHAPES, Compiled, Cut, Shape, call_before, capturing, cuts_of, every_variant, one_collection
from tests.zoo.variant import Variant

# One graph for the first size, one for all, one for another text length.
UNUSUAL = {name: variant for name, variant in VARIANTS.items() if variant.num_graphs != 3}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand(variant: Variant, subtests: pytest.Subtests):
    with one_collection():
        compiled = Compiled(variant, cuts_of(variant))
    compiled.check(subtests)
    with subtests.test("at most one graph more than uncached"):
        assert compiled.num_graphs <= variant.num_graphs + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WanAnimate", "Flux2"])  # The first makes a size of the others' by division.
def test_sizes_may_be_dynamic_from_the_start(name: str, subtests: pytest.Subtests):
    with one_collection():
        compiled = Compiled(VARIANTS[name], [(1, 0), (2, 1)], SHAPES[:2], dynamic=True)
    compiled.check(subtests)
    assert compiled.num_graphs <= num_graphs_uncached(VARIANTS[name], SHAPES[:2], dynamic=True) + 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", UNUSUAL.values(), ids=UNUSUAL)
def test_so_many_graphs_the_uncached_model_makes(variant: Variant):
    assert num_graphs_uncached(variant, SHAPES) == variant.num_graphs


def num_graphs_uncached(variant: Variant, shapes: Sequence[Shape], *, dynamic: bool | None = None) -> int:
    """Graphs that Dynamo makes of the model for generations of these shapes."""
    torch._dynamo.reset()
    model, num_graphs = variant.build(), 0
    call_before(variant, model)
    if variant.functor is not None:
        variant.functor().prepare(model)

    def count(gm, _example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return gm.forward

    graphs = torch.compile(model, backend=count, dynamic=dynamic)
    with one_collection(), capturing(variant):
        for size, text in shapes:
            for call in variant.generation(size=size, text=text):
                graphs(**call)
    return num_graphs


# The reference.

CASES = {f"{v.name}-F{cut[0]}B{cut[1]}": (v, cut) for v in VARIANTS.values() for cut in cuts_of(v)}


@pytest.mark.parametrize(("variant", "cut"), CASES.values(), ids=CASES)
def test_by_hand_a_reused_step_gives_what_the_computed_one_gave_for_equal_inputs(variant: Variant, cut: Cut):
    call, *_ = variant.generation()
    by_hand = ByHand(variant, variant.build(), *cut)
    computed = by_hand(skip=False, **call)
    # a + (b - a) for b, in float32, at values around 1, seen through the blocks that follow.
    torch.testing.assert_close(by_hand(skip=True, **call), computed, rtol=0, atol=5e-6)


@every_variant
def test_a_variant_is_always_the_same_and_its_steps_differ(variant: Variant):
    model, again = variant.build(), variant.build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert len(variant.chain(model)) == variant.num_blocks
    assert all(parameter.any() for parameter in model.parameters() if parameter.numel() > 1)
    before, after, *_ = variant.generation()
    changing = {*variant.latents, *variant.times}
    assert {name for name in before if before[name] is not after[name]} == changing
