"""FLOPs of a run, and of the nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from cachedit_fx.flops import FlopCounter, flops_of

BATCH, ROWS, WIDTH, WIDER = 2, 5, 8, 12
PRODUCT = 2 * BATCH * ROWS * WIDTH * WIDER  # A multiplication and an addition per term.
ATTENTION = 2 * (2 * BATCH * ROWS * ROWS * WIDTH)  # Queries times keys, and weights times values.


def tokens() -> Tensor:
    return torch.randn(BATCH, ROWS, WIDTH)


def heads() -> Tensor:
    return torch.randn(BATCH, 1, ROWS, WIDTH)


def weight() -> Tensor:
    return torch.randn(WIDER, WIDTH)


def captured(run: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> fx.Graph:
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch.compile(run, backend=backend, fullgraph=True, **options)(*inputs)
    return found[0].graph


CALLS = {
    "linear": (lambda x, w: F.linear(x, w, w[:, 0]), (tokens, weight), PRODUCT),
    "matmul": (lambda x, w: x @ w.T, (tokens, weight), PRODUCT),
    "einsum": (lambda x, w: torch.einsum("bnd,ed->bne", x, w), (tokens, weight), PRODUCT),
    "baddbmm": (lambda x, w: torch.baddbmm(x @ w.T, x, w.T.expand(BATCH, -1, -1)), (tokens, weight), 2 * PRODUCT),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (heads,), ATTENTION),
    "convolution": (lambda x, w: F.conv1d(x.mT, w[..., None]), (tokens, weight), PRODUCT),
    "transposed convolution": (
        lambda x, w: F.conv_transpose1d(x.mT, w.T[..., None], stride=3),
        (tokens, weight),
        PRODUCT,
    ),
    "no contraction": (lambda x, w: (x + w[0]).softmax(-1).sum(), (tokens, weight), 0),
}


@pytest.mark.parametrize(("run", "inputs", "expected"), CALLS.values(), ids=CALLS)
def test_the_flops_of_the_nodes_of_a_graph_equal_those_of_its_run(run, inputs, expected):
    given = [make() for make in inputs]
    with torch.no_grad(), FlopCounter() as counter:
        run(*given)
    nodes = captured(run, given).nodes
    assert sum(flops_of(nodes)) == counter.total == expected


def test_a_run_counts_attention_on_the_cpu_in_addition_to_what_torch_counts():
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.scaled_dot_product_attention(x, x, x), w)

    x, w = heads(), weight()
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        run(x, w)
    with torch.no_grad(), FlopCounter() as ours:
        run(x, w)
    assert (theirs.get_total_flops(), ours.total) == (PRODUCT, PRODUCT + ATTENTION)


def test_a_run_counts_the_same_in_inference_mode():
    with torch.inference_mode(), FlopCounter() as counter:
        F.linear(tokens(), weight())
    assert counter.total == PRODUCT


def test_symbolic_sizes_count_as_those_of_the_traced_call():
    graph = captured(lambda x, w: F.linear(x, w), (tokens(), weight()), dynamic=True)
    assert any(
        isinstance(size, torch.SymInt)
        for n in graph.nodes
        for size in getattr(n.meta.get("example_value"), "shape", ())
    )
    assert sum(flops_of(graph.nodes)) == PRODUCT


def test_in_an_autocast_region_operands_may_differ_in_dtype():
    def run(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.linear(x, w), w.T)  # The first returns bfloat16, and the weights are float32.

    assert sum(flops_of(captured(run, (tokens(), weight())).nodes)) == 2 * PRODUCT


def test_a_node_that_cannot_run_by_itself_counts_no_flops():
    graph = captured(lambda x, w: F.linear(x, w) + F.linear(x, w), (tokens(), weight()))
    product = next(node for node in graph.nodes if "linear" in node.name)
    product.kwargs = {"no_such": 1}
    assert sum(flops_of(graph.nodes)) == PRODUCT
