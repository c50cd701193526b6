"""Takes over a graph from Dynamo: which placeholders are weights, and the names that the caller gave to the others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.frontend.process_groups import process_groups
from cachedit_fx.frontend.torch_internals import (
    effect_of_call,
    input_expression,
    is_held_by_module,
    is_passed_as_found,
    is_traced_by_dynamo,
    traced_locals,
)
from cachedit_fx.passes.extract import graph_module
from cachedit_fx.runtime.model_call import current_call
from cachedit_fx.runtime.sources import Sources

# Words in one of Dynamo's expressions that are not names from the code of the model.
_NOT_NAMES = {"L", "G", "self", "args", "kwargs", "__dict__", "_modules", "_parameters", "_buffers", "__class__"}


@dataclass(frozen=True, slots=True)
class GraphInput:
    """Where a placeholder comes from.

    Attributes:
        name: Its name in the model or in its signature: `hidden_states`, `weight`.
        is_weight: Whether the model holds it (a parameter, buffer or number), rather than its caller passing it.
        path: The name with the path to it: `blocks.1.norm.weight`, `joint_attention_kwargs.scale`.
    """

    name: str
    is_weight: bool
    path: str = ""


def copy_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A copy of Dynamo's graph for the passes, with labelled inputs. Dynamo reads its own after the backend returns.

    A placeholder keeps the fake tensor that Dynamo traced with. Its `meta["cachedit_example"]` is what Dynamo passes to
    the backend, with which pieces have to be compiled. `meta["cachedit_offloaded"]` marks the weights of an offloaded
    model, which only pieces may read. A node that communicates with other processes has the groups in its
    `meta["cachedit_groups"]`.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copy = graph_module(gm, graph, "Captured")
    names, call = _argument_names(), current_call()
    placement = call.placement if call is not None else None
    before = [node for node in gm.graph.nodes if node.op == "placeholder"]
    after = [node for node in graph.nodes if node.op == "placeholder"]
    for old, new, example in zip(before, after, example_inputs, strict=True):
        new.meta["cachedit_input"] = _graph_input(old, example, names)
        new.meta["cachedit_example"] = example
        if placement is not None and placement.is_stand_in(example):
            new.meta["cachedit_offloaded"] = True
        new.meta.setdefault("example_value", example)
    for inner in copy.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            groups = process_groups(node)
            if groups:
                node.meta["cachedit_groups"] = groups
    return copy


def sources_of(gm: fx.GraphModule) -> Sources:
    """How Dynamo will call the graph for which it is calling the backend now."""
    if not is_traced_by_dynamo():
        return Sources(reason="the backend was not called by Dynamo")
    try:
        reason, inputs = effect_of_call(), [node for node in gm.graph.nodes if node.op == "placeholder"]
        if not reason and not all(map(is_passed_as_found, inputs)):
            reason = "Dynamo makes an input of the graph at every call"
        return Sources(reason=reason) if reason else Sources(tuple(map(input_expression, inputs)))
    except (ImportError, AttributeError) as error:
        return Sources(reason="this version of torch does not record how Dynamo calls the graph", error=repr(error))


def forget_examples(*modules: fx.GraphModule) -> None:
    """Removes the references to what Dynamo passed, so that a prompt can be deleted, which ends its session."""
    for module in modules:
        for inner in module.modules():
            for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                node.meta.pop("cachedit_example", None)


def captured_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing now; None if it is unknown."""
    frame = traced_locals()
    found = frame.get("self")
    if isinstance(found, torch.nn.Module):
        return found
    modules = [value for value in frame.values() if isinstance(value, torch.nn.Module)]
    return modules[0] if len(modules) == 1 else None


def _argument_names() -> list[str]:
    """The names of the positional arguments of the forward. A decorator of the forward sees them as `args[N]`."""
    module = captured_module()
    if module is None:
        return []
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def _graph_input(node: fx.Node, example: Any, names: list[str]) -> GraphInput:
    text = input_expression(node)
    is_parameter = "_parameters" in text or "_buffers" in text or isinstance(example, torch.nn.Parameter)
    is_held = is_held_by_module(node) or is_parameter
    position = re.fullmatch(r"L\['args'\]\[(\d+)\]", text)
    if position and int(position[1]) < len(names):
        name = names[int(position[1])]
        return GraphInput(name, is_weight=False, path=name)
    words = re.findall(r"[A-Za-z_]\w*", text)
    is_weight = is_held or not isinstance(example, torch.Tensor) or text.startswith("G[")
    parts = [word for word in re.findall(r"\w+", text) if word not in _NOT_NAMES]
    return GraphInput(words[-1] if words else node.name, is_weight=is_weight, path=".".join(parts))
