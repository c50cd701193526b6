"""What a graph does beside computing its outputs from its inputs: then a part of it must not run twice.

Read off the operations: their schemas and tags where they have any, and else their names.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from cachedit_fx.passes.analysis.contexts import sets_state
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.writes import written_outside
from cachedit_fx.patterns.nodes import call_text, is_tensor

_PURE_ROOTS = ("", "torch", "_operator", "operator", "math", "builtins", "einops")
_PURE_HIGHER_ORDER = ("flex_attention",)

# Functions of torch that draw random numbers and are no ATen operators, so that nothing else tells.
_RANDOM_FUNCTIONS = {
    *("dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"),
    *("fractional_max_pool2d", "fractional_max_pool2d_with_indices"),
    *("fractional_max_pool3d", "fractional_max_pool3d_with_indices"),
    *("svd_lowrank", "pca_lowrank", "lobpcg"),
}
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def effect_of(program: Program) -> str:
    """The first thing that a graph does beside computing, as `draws random numbers (randn(...))`; empty for nothing.

    What it writes in place counts only where it is not a tensor that the graph itself made.
    """
    nodes = [*program.nodes_in(0, len(program.nodes))]
    written = written_outside(program, nodes)
    if written is not None:
        return f"writes in place into what it is given (`{call_text(written)}`)"
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
        return "calls a module, of which nothing is known"
    if isinstance(target, HigherOrderOperator):
        return "" if target.__name__ in _PURE_HIGHER_ORDER else "calls an operator on functions"
    if isinstance(target, OpOverload | OpOverloadPacket):
        return _effect_of_overloads(node, target)
    if (getattr(target, "__module__", None) or "").partition(".")[0] not in _PURE_ROOTS:
        return "calls a function of which nothing is known"
    if getattr(target, "__name__", "") == "_set_grad_enabled" or (sets_state(node) and not is_tensor(node)):
        return "sets a state"  # Its end may lie behind what has run.
    return "draws random numbers" if _is_random(node, getattr(target, "__name__", "")) else ""


def _effect_of_overloads(node: fx.Node, target: OpOverload | OpOverloadPacket) -> str:
    if isinstance(target, OpOverload):  # What it writes into has been looked at.
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
    """Whether a function or method of torch by this name draws random numbers, with these arguments."""
    return (_is_tagged(name) or name in _RANDOM_FUNCTIONS) and not _is_switched_off(node, name)


@functools.cache  # A graph has thousands of nodes and some dozens of functions.
def _is_tagged(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(packet))


def _overloads(packet: Any) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()] if packet is not None else []


def _is_switched_off(node: fx.Node, name: str) -> bool:
    """Whether the arguments say that nothing is dropped."""
    if name == "scaled_dot_product_attention":
        return _given(node, 4, "dropout_p", 0.0) == 0.0
    if name == "multi_head_attention_forward":
        return _given(node, 10, "dropout_p", 0.0) == 0.0 or _given(node, 13, "training", True) is False
    if name not in _DROPOUTS:
        return False
    is_training = _given(node, 2, "train" if "train" in node.kwargs else "training", True)
    return _given(node, 1, "p", 0.5) == 0.0 or is_training is False


def _given(node: fx.Node, position: int, name: str, default: object) -> object:
    """An argument by its name or position. Functions written in C have no signature to ask."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
