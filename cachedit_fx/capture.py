"""What Dynamo hands over: which placeholders are weights and what the caller called the others. Knows Dynamo."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.passes.extract import graph_module

# What stands in a source between the names that a user wrote.
_HOLDERS = {"L", "G", "self", "args", "kwargs", "__dict__", "_modules", "_parameters", "_buffers", "__class__"}


@dataclass(frozen=True, slots=True)
class GraphInput:
    """Where a placeholder comes from.

    Attributes:
        name: What the caller or the model calls it: `hidden_states`, `weight`.
        is_weight: A parameter or buffer (or a number) that the model holds, rather than something passed to it.
        path: The same with where it is held: `blocks.1.norm.weight`, `joint_attention_kwargs.scale`.
    """

    name: str
    is_weight: bool
    path: str = ""


def copy_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A copy of Dynamo's graph to work on (it looks at its own again after the backend returns), inputs labelled.

    A placeholder keeps the fake tensor that Dynamo traced with, and beside it, as `cachedit_example`, what Dynamo
    passes to a backend: a piece has to be compiled with that one.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copy = graph_module(gm, graph, "Captured")
    names = _argument_names()
    before = [node for node in gm.graph.nodes if node.op == "placeholder"]
    after = [node for node in graph.nodes if node.op == "placeholder"]
    for old, new, example in zip(before, after, example_inputs, strict=True):
        new.meta["cachedit_input"] = _graph_input(old, example, names)
        new.meta["cachedit_example"] = example
        new.meta.setdefault("example_value", example)
    return copy


def sources_of(gm: fx.GraphModule) -> list[str] | None:
    """For every placeholder of Dynamo's graph the expression, over a frame's locals `L`, that it is found by.

    None if they are not known, or if Dynamo does more at a call than run the graph: it writes to an attribute, say.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        changed = [found for found in effects.id_to_variable.values() if effects.is_modified(found)]
        # What the call itself makes concerns no one, unless it is returned.
        is_lasting = any(not isinstance(v.mutation_type, AttributeMutationNew | ValueMutationNew) for v in changed)
        if is_lasting or effects.tensor_hooks or effects.save_for_backward or output.random_calls:
            return None
    except (ImportError, AttributeError):  # Not inside Dynamo: the backend was called by hand.
        return None
    inputs = [node.meta.get("grapharg") for node in gm.graph.nodes if node.op == "placeholder"]
    if any(given is None or given.source is None or given.pass_arg_as_tensor for given in inputs):
        return None
    return [_text(given.source) for given in inputs]


def _text(source: Any) -> str:
    found: str = source.name if isinstance(source.name, str) else source.name()
    return found


def forget_examples(*modules: fx.GraphModule) -> None:
    """Lets go of what Dynamo passed: a prompt must be able to die, and its session with it."""
    for module in modules:
        for inner in module.modules():
            for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                node.meta.pop("cachedit_example", None)


def captured_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing now, if that can be told."""
    frame = _traced_locals()
    found = frame.get("self")
    if isinstance(found, torch.nn.Module):
        return found
    modules = [value for value in frame.values() if isinstance(value, torch.nn.Module)]
    return modules[0] if len(modules) == 1 else None


def _traced_locals() -> dict[str, Any]:
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return dict(InstructionTranslator.current_tx().f_locals)
    except (ImportError, AttributeError):  # Not inside Dynamo: the backend was called by hand.
        return {}


def _argument_names() -> list[str]:
    """Names of the forward's positional arguments: a decorated forward sees them as `args[N]`."""
    module = captured_module()
    if module is None:
        return []
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def _graph_input(node: fx.Node, example: Any, names: list[str]) -> GraphInput:
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = "" if source is None else _text(source)
    holder = getattr(source, "guard_source", None)
    in_module = holder is not None and (holder.is_unspecialized_nn_module() or holder.is_specialized_nn_module())
    held = in_module or "_parameters" in text or "_buffers" in text or isinstance(example, torch.nn.Parameter)
    position = re.fullmatch(r"L\['args'\]\[(\d+)\]", text)
    if position and int(position[1]) < len(names):
        name = names[int(position[1])]
        return GraphInput(name, is_weight=False, path=name)
    words = re.findall(r"[A-Za-z_]\w*", text)
    is_weight = held or not isinstance(example, torch.Tensor) or text.startswith("G[")
    parts = [word for word in re.findall(r"\w+", text) if word not in _HOLDERS]
    return GraphInput(words[-1] if words else node.name, is_weight=is_weight, path=".".join(parts))
