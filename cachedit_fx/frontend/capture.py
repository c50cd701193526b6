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
from cachedit_fx.runtime.sources import Sources

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


def sources_of(gm: fx.GraphModule) -> Sources:
    """How Dynamo, which is calling the backend now, will call the graph."""
    translator = _translator()
    if translator is None:
        return Sources(reason="the backend was called by hand, not by Dynamo")
    try:
        reason = _beside_the_graph(translator.output)
        inputs = [node.meta.get("grapharg") for node in gm.graph.nodes if node.op == "placeholder"]
        if not reason and any(given is None or given.source is None or given.pass_arg_as_tensor for given in inputs):
            reason = "Dynamo makes an input of the graph anew at every call"
        return Sources(reason=reason) if reason else Sources(tuple(_text(given.source) for given in inputs if given))
    except (ImportError, AttributeError) as error:
        return Sources(reason="Dynamo's records of the graph are not where they were", error=repr(error))


def _beside_the_graph(output: Any) -> str:
    """What Dynamo does at a call besides running the graph (`output` is its record of the trace); empty for nothing."""
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    effects, code = output.side_effects, output.root_tx.f_code
    # What the call itself makes concerns no one, unless it is returned; **kwargs are a new dictionary at every call.
    before = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    others = code.co_varnames[before] if code.co_flags & inspect.CO_VARKEYWORDS else None
    for found in effects.id_to_variable.values():
        if not effects.is_modified(found) or isinstance(found.mutation_type, AttributeMutationNew | ValueMutationNew):
            continue
        source = _text(found.source) if found.source is not None else "an object"
        if source != f"L['{others}']":
            return f"the forward changes {source}"
    if effects.tensor_hooks or effects.save_for_backward:
        return "the forward prepares a backward pass"
    return "the forward draws random numbers in Python" if output.random_calls else ""


def _text(source: Any) -> str:
    found: str = source.name if isinstance(source.name, str) else source.name()
    return found


def forget_examples(*modules: fx.GraphModule) -> None:
    """Lets go of what Dynamo passed: a prompt must be able to die, and its session with it."""
    for module in modules:
        for inner in module.modules():
            for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                node.meta.pop("cachedit_example", None)


def _translator() -> Any:
    """Dynamo's state of the trace that this thread is in; None outside of one."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx()
    except (ImportError, AttributeError):  # Not inside Dynamo: the backend was called by hand.
        return None


def captured_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing now, if that can be told."""
    frame = _traced_locals()
    found = frame.get("self")
    if isinstance(found, torch.nn.Module):
        return found
    modules = [value for value in frame.values() if isinstance(value, torch.nn.Module)]
    return modules[0] if len(modules) == 1 else None


def is_resumed() -> bool:
    """Whether Dynamo is tracing what follows on a graph break in a function."""
    translator = _translator()
    return translator is not None and str(translator.f_code.co_name).startswith("torch_dynamo_resume_in")


def _traced_locals() -> dict[str, Any]:
    translator = _translator()
    return dict(translator.f_locals) if translator is not None else {}


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
