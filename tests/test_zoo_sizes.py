"""New sizes as Dynamo meets them by itself: a graph for the first one, one for all, one for another text length.

The sessions of a model then run through several graphs. The models are three where Dynamo makes these three graphs, and
one where it makes fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.zoo import VARIANTS
from tests.zoo.runs import SHAPES, Compiled, Shape, call_before, capturing, one_collection
from tests.zoo.variant import Variant

NUM_GRAPHS = {
    "Flux": 3,
    "QwenImage": 3,
    "Wan": 3,
    "CogVideoX": 2,
}  # Of the uncached model.


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_GRAPHS)
def test_every_size_is_cached_in_at_most_one_graph_more_than_the_model_makes(name: str, subtests: pytest.Subtests):
    with one_collection(), torch.no_grad():
        compiled = Compiled(VARIANTS[name], (1, 0))
    for shape, generation in compiled.found.items():
        with subtests.test("image size, text length", shape=shape):
            generation.check()
    assert compiled.num_graphs <= NUM_GRAPHS[name] + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CogVideoX", "Wan"])
def test_so_many_graphs_the_uncached_model_makes(name: str):
    assert num_graphs_uncached(VARIANTS[name], SHAPES) == NUM_GRAPHS[name]


def num_graphs_uncached(variant: Variant, shapes: Sequence[Shape]) -> int:
    """Graphs that Dynamo makes of the model for generations of these shapes."""
    torch._dynamo.reset()
    model, num_graphs = variant.build(), 0
    call_before(variant, model)

    def count(gm, _example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return gm.forward

    graphs = torch.compile(model, backend=count)
    with one_collection(), torch.no_grad(), capturing(variant):
        for size, text in shapes:
            for call in variant.generation(size=size, text=text):
                graphs(**call)
    return num_graphs
