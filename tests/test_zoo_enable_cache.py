"""All transformers of the zoo through `enable_cache`, end to end, in bfloat16 and inference mode, until it is disabled.

What was captured on the way is compiled once more with two Fn blocks and a Bn block, and run in the place of the first.
"""

from __future__ import annotations

import contextlib

import torch

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig
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
from tests.zoo.twins import Twins
from tests.zoo.variant import Variant

ROWS = PAGE.read_text(encoding="utf-8").splitlines()
FIRST, SECOND = (1, 0), (2, 1)


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand_until_it_is_disabled(variant: Variant):
    with one_collection(), torch.inference_mode():
        model = variant.build(torch.bfloat16)
        call_before(variant, model, torch.bfloat16)
        calls = variant.generation(dtype=torch.bfloat16)
        plain = [tensors_of(model(**call)) for call in calls]
        by_hand = {
            cut: steps_by_hand(variant, model, calls, cut) for cut in (FIRST, SECOND) if cut not in variant.refused
        }
        before = dict(vars(model))
        functor = variant.functor() if variant.functor is not None else None
        target = model if functor is None else BlockAdapter(transformer=model, patch_functor=functor)
        cachedit_fx.enable_cache(target, Fn_compute_blocks=FIRST[0], **SETTINGS)
        twins = Twins(CacheConfig(Fn_compute_blocks=SECOND[0], Bn_compute_blocks=SECOND[1], **SETTINGS))
        with named(variant, has_clock=variant.clock != "none"):
            with twins.compiled() if SECOND in by_hand else contextlib.nullcontext(), watched() as seen:
                outputs = [tensors_of(model(**calls[0]))]
            outputs += [tensors_of(model(**call)) for call in calls[1:]]
        assert seen.row(variant) in ROWS, "docs/models.md is stale: run `make models`"
        Generation(decisions_in(model), outputs, plain, by_hand[FIRST], atol_of(variant)).check()
        if SECOND in by_hand:
            cachedit_fx.reset()
            with named(variant, has_clock=variant.clock != "none"), twins.instead():
                outputs = [tensors_of(model(**call)) for call in calls]
            Generation(decisions_in(model), outputs, plain, by_hand[SECOND], atol_of(variant)).check()
        cachedit_fx.disable_cache(target)
        assert dict(vars(model)) == before
        torch.testing.assert_close(tensors_of(model(**calls[-1])), plain[-1], rtol=0, atol=0)
