"""All transformers of the zoo through `enable_cache`, as docs/models.md says, and undone."""

from __future__ import annotations

import torch

import cachedit_fx
from cachedit_fx import BlockAdapter
from tests.zoo.by_hand import tensors_of
from tests.zoo.runs import (
    SETTINGS,
    Generation,
    atol_of,
    call_before,
    decisions_in,
    every_variant,
    named,
    one_collection,
    steps_by_hand,
)
from tests.zoo.table import PAGE, watched
from tests.zoo.variant import Variant

ROWS = PAGE.read_text(encoding="utf-8").splitlines()
FN = 1


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand_until_it_is_disabled(variant: Variant):
    with one_collection(), torch.no_grad():
        model = variant.build()
        call_before(variant, model)
        calls = variant.generation()
        plain = [tensors_of(model(**call)) for call in calls]
        by_hand = steps_by_hand(variant, model, calls, (FN, 0))
        before = dict(vars(model))
        functor = variant.functor() if variant.functor is not None else None
        target = model if functor is None else BlockAdapter(transformer=model, patch_functor=functor)
        cachedit_fx.enable_cache(target, Fn_compute_blocks=FN, **SETTINGS)
        with named(variant, has_clock=variant.clock != "none"):
            with watched() as seen:
                outputs = [tensors_of(model(**calls[0]))]
            outputs += [tensors_of(model(**call)) for call in calls[1:]]
        assert seen.row(variant) in ROWS, "docs/models.md is stale: run `make models`"
        Generation(decisions_in(model), outputs, plain, by_hand, atol_of(variant)).check()
        cachedit_fx.disable_cache(target)
        assert dict(vars(model)) == before
        torch.testing.assert_close(tensors_of(model(**calls[-1])), plain[-1], rtol=0, atol=0)
