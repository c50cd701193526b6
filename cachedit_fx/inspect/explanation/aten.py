"""Traces a graph into aten operations, which the inner backend receives."""

from __future__ import annotations

import torch
from functorch import make_fx
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from cachedit_fx.inspect.explanation.costs import at_hint
from cachedit_fx.patterns.nodes import value_of


def aten_view(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns the graph traced by functorch, at the shapes of the explained call. Nothing is computed.

    Raises:
        RuntimeError: The graph calls the runtime (as the graph "after" does), or its shapes depend on data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    with mode, torch.no_grad():
        inputs = [at_hint(value_of(node), mode) for node in placeholders]
        traced: fx.GraphModule = make_fx(gm)(*inputs)
    return traced
