"""All transformers of the zoo through `enable_cache`, end to end, in bfloat16 and inference mode, until it is disabled.

Each is captured once, and every way to cut the chain is compiled from that capture. Most are captured for all sizes
(`dynamic=True`); those whose blocks are another's are captured with fixed ones, as a user has them by default. What
Dynamo does by itself when a second size comes, float32 and the bare backend are tested on a few in
`tests/test_zoo_sizes.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.zoo.runs import FEW_SHAPES, Cached, cuts_of, every_variant, one_collection
from tests.zoo.table import PAGE, without_counts
from tests.zoo.variant import Variant

ROWS = PAGE.read_text(encoding="utf-8").splitlines()
LIKE = {
    "FluxControlNet": "Flux",
    "Bria": "Flux",
    "QwenImageControlNet": "QwenImage",
    "WanI2V": "Wan",
    "Wan22TI2V": "Wan",
    "ChronoEdit": "Wan",
    "AnyFlow": "Wan",
    "HunyuanImage": "HunyuanVideo",
    "CogVideoX5B": "CogVideoX",
    "ConsisID": "CogVideoX",
    "CogView3Plus": "CogView4",
    "SD35": "SD3",
    "SD3ControlNet": "SD3",
    "DiT": "PixArt",
    "SanaControlNet": "Sana",
    "HiDreamInfer": "HiDream",
    "ZImageControlNet": "ZImage",
    "StableAudio3": "StableAudio",
}
"""Whose blocks and loops are those of another variant; these are captured with fixed sizes."""


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand(variant: Variant, subtests: pytest.Subtests):
    is_fixed = variant.name in LIKE
    with one_collection(), torch.inference_mode():
        cached = Cached(variant, cuts_of(variant), FEW_SHAPES[:1] if is_fixed else FEW_SHAPES, dynamic=not is_fixed)
    for (cut, shape), generation in cached.found.items():
        with subtests.test("Fn, Bn; image size, text length", cut=cut, shape=shape):
            generation.check()
    with subtests.test("no graph for every size, unless Dynamo breaks the model up"):
        assert cached.num_graphs <= 2 or variant.clock == "model"
    with subtests.test("docs/models.md is as found; if it is stale, run `make models`"):
        if is_fixed:
            assert cached.row in ROWS
        else:  # With sizes for all, fewer blocks are equal (their strides are symbols), and Dynamo may stop elsewhere.
            assert without_counts(cached.row) in map(without_counts, ROWS)
