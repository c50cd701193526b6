"""All transformers of the zoo through `enable_cache`, end to end, in bfloat16 and inference mode, until it is disabled.

Each is captured once, and all its cuts are compiled from that capture. Transformers with blocks of their own kind are
captured for all sizes (`dynamic=True`), the others with fixed sizes, which is the default for users. The default
behaviour of Dynamo at a second size, float32 and the bare backend are tested on a few models in
`tests/test_zoo_sizes.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.zoo.runs import Cached, cuts_of, every_variant
from tests.zoo.table import PAGE, without_counts
from tests.zoo.variant import Variant

ROWS = PAGE.read_text(encoding="utf-8").splitlines()
LIKE = {
    "FluxControlNet": "Flux",
    "Chroma": "Flux",
    "Bria": "Flux",
    "BriaFibo": "Flux",
    "QwenImageControlNet": "QwenImage",
    "WanI2V": "Wan",
    "Wan22TI2V": "Wan",
    "ChronoEdit": "Wan",
    "AnyFlow": "Wan",
    "WanVACE": "Wan",
    "HunyuanVideoFramepack": "HunyuanVideo",
    "HunyuanImage": "HunyuanVideo",
    "LTX2": "LTX",
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
    "SkyReelsV2": "Wan",
    "SkyReelsV2DF": "Wan",
    "Kandinsky5": "Wan",
    "SanaVideo": "Sana",
    "Kandinsky6": "LTX2",
    "Kandinsky6SR": "Wan",
    "EasyAnimate": "CogVideoX",
    "Helios": "Wan",
    "MotifVideo": "HunyuanVideo",
    "AnyFlowFAR": "Wan",
    "AuraFlow": "SD3",
    "LongCatImage": "Flux",
    "OvisImage": "Flux",
    "Flux3Edit": "Flux3",
    "JoyImageEditPlus": "JoyImageEdit",
    "BriaFibo2": "ZImage",
    "BriaFibo2Edit": "ZImage",
    "PRX": "PixArt",
}
"""Variants whose blocks are similar to those of another variant."""

# Parts are recaptured for another length in any case; sizes of HiDream are tested in tests/test_functors_shipped.py.
FIXED = {*LIKE, "HunyuanVideo15", "Lumina2", "OmniGen", "HiDream"}
# One size, to save time.
FIXED |= {"AceStep", "T5Film", "SanaWM", "SanaWMRefiner", "MiniMaxH3", "Flux3", "Krea2", "QwenImage21Later"}
# Dynamo recaptures these for another image size although it is asked for one graph for all sizes, so they are run with
# another text length instead. QwenImage and NucleusMoE take lengths as plain numbers, and are run with one size only.
ANOTHER_TEXT = {"WanAnimate", "HunyuanVideo", "HunyuanDiT", "Latte", "Mochi", "Allegro", "CogVideoX", "CogView4", "SD3"}
ANOTHER_TEXT |= {"PixArt", "Sana", "JoyImageEdit", "ErnieImage", "StableAudio"}
ONE_SIZE = {*FIXED, "QwenImage", "NucleusMoE"}


@every_variant
def test_steps_match_the_model_or_the_blocks_skipped_by_hand(variant: Variant, subtests: pytest.Subtests):
    is_fixed, shapes = variant.name in FIXED, [(0, 0)]
    if variant.name not in ONE_SIZE:
        shapes.append((0, 1) if variant.name in ANOTHER_TEXT else (1, 1))
    with torch.inference_mode():
        cached = Cached(variant, cuts_of(variant), shapes, dynamic=not is_fixed)
    for (cut, shape), generation in cached.found.items():
        with subtests.test("Fn, Bn; image size, text length", cut=cut, shape=shape):
            generation.check()
    with subtests.test("one graph, unless Dynamo breaks the model up"):
        assert cached.num_graphs == 1 or variant.timestep_input == "model"
    with subtests.test("docs/models.md is as found; if it is stale, run `make models`"):
        if is_fixed:
            assert cached.row in ROWS
        else:  # With dynamic sizes fewer blocks are equal (their strides are symbols), and graph breaks may differ.
            assert without_counts(cached.row) in map(without_counts, ROWS)
