"""All transformers of the zoo in bfloat16 and inference mode."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import VARIANTS
from tests.zoo.runs import Compiled, every_variant, one_collection
from tests.zoo.variant import Variant

CUTS_OF = {name: [cut for cut in ((1, 0), (2, 1)) if cut not in v.refused] for name, v in VARIANTS.items()}


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand(variant: Variant, subtests: pytest.Subtests):
    with one_collection(), torch.inference_mode():
        compiled = Compiled(variant, CUTS_OF[variant.name], [(0, 0)], dtype=torch.bfloat16, dynamic=False)
    compiled.check(subtests)
