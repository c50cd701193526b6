"""New sizes with the default of Dynamo: one graph for the first size, one for all, one for another text length.

The sessions of a model then use several graphs. Dynamo makes these three graphs for three of the models, and fewer for
the fourth.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.zoo import VARIANTS
from tests.zoo.runs import SHAPES, Compiled, Shape, call_before, capturing
from tests.zoo.variant import Variant

NUM_GRAPHS = {
    "Flux": 3,
    "QwenImage": 3,
    "Wan": 3,
    "CogVideoX": 2,
}  # The numbers for the uncached model.


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_GRAPHS)
def test_every_size_is_cached_with_at_most_one_graph_more_than_the_uncached_model(name: str, subtests: pytest.Subtests):
    with torch.no_grad():
        compiled = Compiled(VARIANTS[name], (1, 0))
    for shape, generation in compiled.found.items():
        with subtests.test("image size, text length", shape=shape):
            generation.check()
    assert compiled.num_graphs <= NUM_GRAPHS[name] + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CogVideoX", "Wan"])
def test_the_uncached_model_makes_the_expected_number_of_graphs(name: str):
    assert num_graphs_uncached(VARIANTS[name], SHAPES) == NUM_GRAPHS[name]


def num_graphs_uncached(variant: Variant, shapes: Sequence[Shape]) -> int:
    """The number of graphs that Dynamo makes of the uncached model for generations of these shapes."""
    torch._dynamo.reset()
    model, num_graphs = variant.build(), 0
    call_before(variant, model)

    def count(gm, _example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return gm.forward

    graphs = torch.compile(model, backend=count)
    with torch.no_grad(), capturing(variant):
        for size, text in shapes:
            for call in variant.generation(size=size, text=text):
                graphs(**call)
    return num_graphs
