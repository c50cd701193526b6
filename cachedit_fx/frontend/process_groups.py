"""Finds the process groups over which the nodes of a graph communicate.

Without the private names of torch that this file uses (`_resolve_process_group`, `torch._ops`, `FakeScriptObject`), a
graph with collectives raises an error when it is compiled, and runs without the cache. Other graphs are not affected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


def process_groups(node: fx.Node) -> dict[str, tuple[int, ...]]:
    """The process groups over which a node of a graph communicates: name -> the ranks of its members.

    A functional collective names its group in an argument. Other functions may take a group, and operations on DTensors
    communicate over the groups of the mesh.

    Uses `_resolve_process_group` and the classes of operators. Without them, a graph with collectives raises an error
    when it is compiled, and runs without the cache.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for name in _group_names(node, distributed):
        group = distributed.distributed_c10d._resolve_process_group(name)
        found[name] = tuple(distributed.get_process_group_ranks(group))
    return found


def _group_names(node: fx.Node, distributed: Any) -> Iterator[str]:
    if node.op not in ("call_function", "call_method"):
        return
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = target if isinstance(target, torch._ops.OpOverloadPacket) else target.overloadpacket
        for overload in (getattr(packet, name) for name in packet.overloads()):
            names = [argument.name for argument in overload._schema.arguments]
            given = [*zip(names, node.args, strict=False), *node.kwargs.items()]
            yield from (value for name, value in given if "group" in name and isinstance(value, str))
    for value in (*pytree.tree_leaves((node.args, node.kwargs)), node):
        found = _real(value.meta.get("example_value") if isinstance(value, fx.Node) else value)
        if isinstance(found, distributed.ProcessGroup):
            yield found.group_name
        mesh = found if isinstance(found, distributed.DeviceMesh) else _real(getattr(found, "device_mesh", None))
        if isinstance(mesh, distributed.DeviceMesh):
            yield from (group.group_name for group in mesh.get_all_groups())


def _real(value: Any) -> Any:
    """The object that a fake one stands for in a trace; other values as they are."""
    from torch._library.fake_class_registry import FakeScriptObject

    return value.real_obj if isinstance(value, FakeScriptObject) else value
