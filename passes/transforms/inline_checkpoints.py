"""Takes the contents of gradient checkpoints into the graph: without gradients a checkpoint does nothing.

tag_activation_checkpoint(wrap_body_0, x)     ->     what wrap_body_0 does with x
"""

from __future__ import annotations

import operator

import torch
from torch import fx


def inline_checkpoints(gm: fx.GraphModule) -> bool:
    """Returns whether anything changed. Checkpoints in checkpoints are taken in as well."""
    changed = False
    while calls := [node for node in gm.graph.nodes if _is_checkpoint(node)]:
        for call in calls:
            _inline(gm, call)
        changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def _is_checkpoint(node: fx.Node) -> bool:
    return node.target is torch.ops.higher_order.tag_activation_checkpoint


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
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index, arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not holder.users:
        gm.graph.erase_node(holder)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """The name under which the body's attribute is found in `gm`."""
    value, unique = getattr(body, name), name
    while hasattr(gm, unique) and getattr(gm, unique) is not value:
        unique += "_"
    setattr(gm, unique, value)
    return unique
