"""The module that `torch.export` traces: a cached graph with the weights of the model and a state as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachedit_fx.exporting.state_layout import StateLayout
from cachedit_fx.exporting.tensor_step import TensorStep
from cachedit_fx.passes.extract import generate_code
from cachedit_fx.passes.transforms.insert_conditionals import compute_or_reuse

Output = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]


class CachedModule(nn.Module):
    """One step of a cached graph.

    Args:
        graph: The cached graph (see `InsertConditionals`). Its conditionals are replaced.
        held: For each argument of the graph, its path and value if the model holds it; None if the caller passes it.
        order: For each argument that the caller passes, its position among the inputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        layout: StateLayout,
        held: Sequence[tuple[str, Any] | None],
        order: Sequence[int],
    ) -> None:
        super().__init__()
        _run_regions_by_step(graph)
        for part in graph.modules():
            if isinstance(part, fx.GraphModule):
                generate_code(part)  # Dynamo does not trace a GraphModule without code.
        self.graph, self.layout, self.order = graph, layout, tuple(order)
        self.weights = nn.Module()
        self._held: list[Any] = []
        for entry in held:
            if entry is None or not isinstance(entry[1], Tensor):
                self._held.append(entry)
            else:
                self._held.append(_register(self.weights, *entry))

    def forward(self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...], threshold: Tensor) -> Output:
        given = iter([inputs[position] for position in self.order])
        step = TensorStep(self.layout, dict(zip((s.name for s in self.layout.specs()), state, strict=True)), threshold)
        outputs = self.graph(step, *(self._argument(entry, given) for entry in self._held))
        return tuple(outputs), step.finish(), torch.stack(step.computes), torch.stack(step.diffs)

    def _argument(self, entry: Any, given: Any) -> Any:
        if entry is None:
            return next(given)
        if isinstance(entry, str):
            owner, _, name = entry.rpartition(".")
            return getattr(self.weights.get_submodule(owner), name)
        return entry[1]


def _run_regions_by_step(graph: fx.GraphModule) -> None:
    """Replaces `compute_or_reuse(...)` by `step.run_region(region, ...)`."""
    step = next(node for node in graph.graph.nodes if node.op == "placeholder")
    conditionals = graph.graph.find_nodes(op="call_function", target=compute_or_reuse)
    for region, node in enumerate(conditionals):
        with graph.graph.inserting_before(node):
            found = graph.graph.call_method("run_region", (step, region, *node.args))
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def _register(root: nn.Module, path: str, tensor: Tensor) -> str:
    """Registers a tensor under its path in the model. Returns the path, which differs if it was taken."""
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    while name in owner._parameters or name in owner._buffers or hasattr(owner, name):
        name += "_"
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        owner.register_buffer(name, tensor.detach())
    return ".".join((*parents, name))
