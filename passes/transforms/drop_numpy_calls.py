"""Erases calls of NumPy that are left in a graph though nothing reads them.

    n = int(np.ceil(7 / 2))     is captured as     ceil = wrapped_ceil(3.5); item = wrapped_item(ceil)

Dynamo writes 4 wherever n is read and leaves the calls behind. They would run at every step, and torch's stand-in for
NumPy sets the default dtype while it makes an array, for all threads: another thread would make its tensors in float64.
"""

from __future__ import annotations

from torch import fx

from cachedit_fx.patterns.nodes import is_tensor


def drop_numpy_calls(gm: fx.GraphModule) -> bool:
    """Erases them. Returns whether there were any."""
    has_changed = False
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and not node.users and _is_number_of_numpy(node):
            gm.graph.erase_node(node)
            has_changed = True
    if has_changed:
        gm.recompile()
    return has_changed


def _is_number_of_numpy(node: fx.Node) -> bool:
    """Whether the node calls a function of NumPy on numbers, or reads the number out of an array."""
    wrapper = node.target  # What Dynamo puts around functions and methods of the stand-in.
    if getattr(wrapper, "method", None) == "item" and _is_of_dynamo(wrapper):
        return True
    module = getattr(getattr(wrapper, "f", None), "__module__", None) or ""
    is_function = module.startswith("torch._numpy.") and "random" not in module and _is_of_dynamo(wrapper)
    return is_function and not any(map(is_tensor, node.all_input_nodes))


def _is_of_dynamo(wrapper: object) -> bool:
    return type(wrapper).__module__ == "torch._dynamo.utils"
