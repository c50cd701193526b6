"""Effects of a graph besides its outputs. No part of a graph that has any may run twice.

Effects follow from the schemas and tags of the operations, and from the names of operations that have neither.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from cachedit_fx.passes.analysis.contexts import sets_state
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.op_tables import DROPOUTS, PURE_HIGHER_ORDER, PURE_PACKAGES, RANDOM_FUNCTIONS
from cachedit_fx.passes.analysis.writes import written_outside
from cachedit_fx.patterns.nodes import call_text, is_tensor


def effect_of(program: Program) -> str:
    """The first effect of a graph, for example "draws random numbers (`randn = ...`)"; empty if it has none.

    A write in place counts if it writes into a tensor that the graph did not create.
    """
    nodes = [*program.nodes_in(0, len(program.nodes))]
    written = written_outside(program, nodes)
    if written is not None:
        return f"writes in place into one of its inputs (`{call_text(written)}`)"
    for node in nodes:
        found = _effect(node)
        if found:
            return f"{found} (`{call_text(node)}`)"
    return ""


def _effect(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_method":
        return "draws random numbers" if _is_random(node, target) else ""
    if node.op != "call_function":
        return "calls a module, whose effects are unknown"
    if isinstance(target, HigherOrderOperator):
        return "" if target.__name__ in PURE_HIGHER_ORDER else "calls an operator on functions"
    if isinstance(target, OpOverload | OpOverloadPacket):
        return _effect_of_overloads(node, target)
    if (getattr(target, "__module__", None) or "").partition(".")[0] not in PURE_PACKAGES:
        return "calls a function whose effects are unknown"
    if getattr(target, "__name__", "") == "_set_grad_enabled" or (sets_state(node) and not is_tensor(node)):
        return "sets a state"  # The node that resets it may lie in the part that does not run again.
    return "draws random numbers" if _is_random(node, getattr(target, "__name__", "")) else ""


def _effect_of_overloads(node: fx.Node, target: OpOverload | OpOverloadPacket) -> str:
    if isinstance(target, OpOverload):  # `effect_of` has checked what it writes into.
        is_random = torch.Tag.nondeterministic_seeded in target.tags
        name = target._schema.name.partition("::")[2]
    else:
        overloads = _overloads(target)
        if any(overload._schema.is_mutable for overload in overloads):
            return "may write in place"
        is_random = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
        name = target.__name__
    return "draws random numbers" if is_random and not _is_switched_off(node, name) else ""


def _is_random(node: fx.Node, name: str) -> bool:
    """Whether a function or method of torch with this name draws random numbers, given the arguments of the node."""
    return (_is_tagged(name) or name in RANDOM_FUNCTIONS) and not _is_switched_off(node, name)


@functools.cache  # A graph has thousands of nodes and a few dozen functions.
def _is_tagged(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(packet))


def _overloads(packet: Any) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()] if packet is not None else []


def _is_switched_off(node: fx.Node, name: str) -> bool:
    """Whether the arguments of a dropout, or of attention with dropout, turn it off."""
    if name == "scaled_dot_product_attention":
        return _given(node, 4, "dropout_p", 0.0) == 0.0
    if name == "multi_head_attention_forward":
        return _given(node, 10, "dropout_p", 0.0) == 0.0 or _given(node, 13, "training", True) is False
    if name not in DROPOUTS:
        return False
    is_training = _given(node, 2, "train" if "train" in node.kwargs else "training", True)
    return _given(node, 1, "p", 0.5) == 0.0 or is_training is False


def _given(node: fx.Node, position: int, name: str, default: object) -> object:
    """An argument by its position or name. Functions that are written in C have no signature that could be read."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
