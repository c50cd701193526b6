"""Inlines gradient checkpoints, which have no effect without gradients.

tag_activation_checkpoint(wrap_body_0, x)     ->     the operations of wrap_body_0, on x
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.graph_pass import GraphPass


class InlineCheckpoints(GraphPass):
    """Inlines all checkpoints, those inside other checkpoints included."""

    name = "inline-checkpoints"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        while calls := _checkpoints(graph_module):
            for call in calls:
                _inline(graph_module, call)
            modified = True
        return PassResult(graph_module, modified)

    def requires(self, graph_module: fx.GraphModule) -> None:
        for call in _checkpoints(graph_module):
            for user in call.users:
                assert user.target is operator.getitem, f"{user} reads the tuple that the checkpoint {call} returns"

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = _checkpoints(graph_module)
        assert not left, f"{left[0]} still calls a checkpoint"


def _checkpoints(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint))


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    holder, *given = call.args
    assert isinstance(holder, fx.Node)
    body: fx.GraphModule = getattr(gm, str(holder.target))
    taken = [node for node in body.graph.nodes if node.op == "placeholder"]
    values = dict(zip(taken, given, strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                values[node] = gm.graph.get_attr(_adopt(gm, body, str(node.target)))
                values[node].meta = dict(node.meta)
        result = gm.graph.graph_copy(body.graph, values)
    for user in list(call.users):
        user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index, arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not holder.users:
        gm.graph.erase_node(holder)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """Gives `gm` an attribute of `body`; returns its name there."""
    value, unique = getattr(body, name), name
    while hasattr(gm, unique) and getattr(gm, unique) is not value:
        unique += "_"
    setattr(gm, unique, value)
    return unique
