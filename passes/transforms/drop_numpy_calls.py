"""Erases calls of NumPy functions whose results nothing reads.

    n = int(np.ceil(7 / 2))     is captured as     ceil = wrapped_ceil(3.5); item = wrapped_item(ceil)

Dynamo writes 4 wherever n is read and leaves the calls in the graph. They would run at every step. While it creates an
array, torch's implementation of NumPy sets the default dtype of all threads, so another thread would create its tensors
in float64.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.graph_pass import GraphPass
from cachedit_fx.patterns.nodes import is_tensor


class DropNumpyCalls(GraphPass):
    """Erases the calls, and those that only they read."""

    name = "drop-numpy-calls"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in reversed(graph_module.graph.nodes):
            if _is_unread_number(node):
                graph_module.graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = next(filter(_is_unread_number, graph_module.graph.nodes), None)
        assert left is None, f"{left} still calls NumPy, and nothing reads its result"


def _is_unread_number(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and _is_number_of_numpy(node)


def _is_number_of_numpy(node: fx.Node) -> bool:
    """Whether the node calls a NumPy function on numbers, or reads the number in an array."""
    wrapper = node.target  # Dynamo wraps the functions and methods of torch's implementation of NumPy.
    if getattr(wrapper, "method", None) == "item" and _is_of_dynamo(wrapper):
        return True
    module = getattr(getattr(wrapper, "f", None), "__module__", None) or ""
    is_function = module.startswith("torch._numpy.") and "random" not in module and _is_of_dynamo(wrapper)
    return is_function and not any(map(is_tensor, node.all_input_nodes))


def _is_of_dynamo(wrapper: object) -> bool:
    return type(wrapper).__module__ == "torch._dynamo.utils"
