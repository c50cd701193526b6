"""All transformers of the zoo with the bare backend, in float32: one capture for all image sizes and text lengths.

Every way to cut the chain is compiled from that capture. What Dynamo does by itself when a second size comes is tested
on a few in `tests/test_zoo_sizes.py`; bfloat16 and fixed sizes are tested in `tests/test_zoo_enable_cache.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.zoo.runs import FEW_SHAPES, Compiled, cuts_of, every_variant, one_collection
from tests.zoo.variant import Variant


@every_variant
def test_steps_are_those_of_the_model_or_of_blocks_skipped_by_hand(variant: Variant, subtests: pytest.Subtests):
    with one_collection(), torch.no_grad():
        compiled = Compiled(variant, cuts_of(variant), FEW_SHAPES, dynamic=True)
    compiled.check(subtests)
    with subtests.test("no graph for every size, unless Dynamo breaks the model up"):
        assert compiled.num_graphs <= 3 or variant.clock == "model"
