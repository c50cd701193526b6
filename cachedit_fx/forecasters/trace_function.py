"""Traces a function of tensors into a graph of ATen operations, without effects on other threads.

The tracer is that of `torch.fx.experimental.proxy_tensor`, whose names exist in torch 2.11 to 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_autocast_cache,
    get_proxy_slot,
    track_tensor_tree,
)


def trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the graph of `function(*inputs)`.

    `torch.fx.experimental.proxy_tensor.make_fx` returns the same graph. While it traces, it patches `torch.nn.Module`
    and sets a flag, both for the whole process: the guards of a model that another thread calls at that moment fail,
    and Dynamo compiles the model again. This function changes only the state of its own thread.

    Args:
        function: Takes tensors and returns a tuple of tensors.
        inputs: Fake tensors. Their shapes become constants of the graph.
    """
    tracer = PythonKeyTracer()
    tracer.root, tracer.graph = nn.Module(), fx.Graph(tracer_cls=PythonKeyTracer)
    tracer.tensor_attrs = {}
    placeholders = [tracer.create_proxy("placeholder", f"arg{number}_1", (), {}) for number in range(len(inputs))]
    track_tensor_tree([*inputs], placeholders, constant=None, tracer=tracer)
    with ProxyTorchDispatchMode(tracer, "real"), disable_autocast_cache():
        found = function(*inputs)
    outputs = tuple(get_proxy_slot(tensor, tracer, tensor, lambda slot: slot.proxy) for tensor in found)
    tracer.create_node("output", "output", (tracer.create_arg(outputs),), {})
    tracer.graph.eliminate_dead_code()
    return fx.GraphModule(tracer.root, tracer.graph)
