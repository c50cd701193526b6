"""Converts a captured graph to JSON and back: its operations and the metadata that the passes read.

Weights and inputs are not stored. Sizes are those of the captured call: a graph with dynamic sizes becomes a static
one.
"""

from __future__ import annotations

import builtins
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import _get_qualified_name

from cachedit_fx.flops import hint
from cachedit_fx.frontend.capture import GraphInput
from cachedit_fx.frontend.torch_internals import (
    numpy_method_wrapper,
    numpy_operator_wrapper,
    numpy_to_tensor_wrapper,
)
from cachedit_fx.patterns.nodes import value_of

# Wrapper -> the attribute that holds the wrapped function or its name.
_NUMPY_WRAPPERS = {numpy_to_tensor_wrapper: "f", numpy_method_wrapper: "method", numpy_operator_wrapper: "op"}
_FRAMES = 2  # The number of innermost frames of a node's stack that are stored.
_TORCH_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)


def to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Returns the graph as data that JSON can store.

    Raises:
        TypeError: JSON cannot store an argument of a node. The message names the node.
    """
    return {"nodes": [_node_to_json(gm, node) for node in gm.graph.nodes]}


def from_json(data: Mapping[str, Any]) -> fx.GraphModule:
    """Returns the graph that `to_json` converted. Its values are fake tensors.

    Raises:
        ImportError: The installed packages do not have a function of the graph.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, root = fx.Graph(), torch.nn.Module()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        args, kwargs = (_decode(entry[part], nodes) for part in ("args", "kwargs"))
        target = _function(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        nodes[entry["name"]] = node
        value = _value_from_json(entry["value"], mode)
        if entry["op"] == "get_attr":
            _set_attribute(root, str(target), value)
        _read_meta(node, entry, value)
    gm = fx.GraphModule(root, graph, class_name="Captured")
    gm.graph.lint()
    return gm


def _node_to_json(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    info: GraphInput | None = node.meta.get("cachedit_input")
    is_function = node.op == "call_function"
    value = value_of(node)
    if node.op == "get_attr" and value is None:
        value = _attribute(gm, str(node.target))
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    starts = [i for i, line in enumerate(trace) if line.strip().startswith("File ")]
    try:
        return {
            "name": node.name,
            "op": node.op,
            "target": _name_of(node.target) if is_function else node.target,
            "args": _encode(node.args),
            "kwargs": _encode(dict(node.kwargs)),
            "value": _value_to_json(value),
            "input": [info.name, info.is_weight, info.path] if info is not None else None,
            "stack": [
                [key, *_class_to_json(*entry)] for key, entry in (node.meta.get("nn_module_stack") or {}).items()
            ],
            "trace": "\n".join(trace[starts[-_FRAMES:][0] :]) if starts else "",
        }
    except TypeError as error:
        raise TypeError(f"node `{node.name}`: {error}") from error


def _read_meta(node: fx.Node, entry: Mapping[str, Any], value: Any) -> None:
    if value is not None:
        node.meta["example_value"] = value
    if entry["input"] is not None:
        node.meta["cachedit_input"] = GraphInput(*entry["input"])
        node.meta["cachedit_example"] = value
    if entry["stack"]:
        node.meta["nn_module_stack"] = {key: (path, _class(*where)) for key, path, *where in entry["stack"]}
    if entry["trace"]:
        node.meta["stack_trace"] = entry["trace"]


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return {type(value).__name__ if type(value) in (tuple, list) else "tuple": [_encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[str(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, _TORCH_CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return hint(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return {"function": _name_of(value)}
    raise TypeError(f"expected numbers, strings, slices, dtypes and devices, found {type(value).__name__}")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    decoders: dict[str, Callable[[], Any]] = {
        "node": lambda: nodes[held],
        "tuple": lambda: tuple(_decode(item, nodes) for item in held),
        "list": lambda: [_decode(item, nodes) for item in held],
        "dict": lambda: {key: _decode(item, nodes) for key, item in held},
        "slice": lambda: slice(*(_decode(part, nodes) for part in held)),
        "torch": lambda: getattr(torch, held),
        "device": lambda: torch.device(held),
        "ellipsis": lambda: Ellipsis,
        "float": lambda: float(held),
        "function": lambda: _function(held),
    }
    return decoders[kind]()


def _value_to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {
            "shape": [hint(size) for size in value.shape],
            "stride": [hint(size) for size in value.stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
            "is_parameter": isinstance(value, torch.nn.Parameter),
            "symbols": [str(size) for size in value.shape] if any(not isinstance(s, int) for s in value.shape) else [],
        }
    if isinstance(value, tuple | list):
        return [_value_to_json(item) for item in value]
    value = hint(value)
    return value if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _value_from_json(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, list):
        return tuple(_value_from_json(item, mode) for item in value)
    if not isinstance(value, dict):
        return value
    with mode:
        tensor = torch.empty_strided(
            value["shape"], value["stride"], dtype=getattr(torch, value["dtype"]), device=value["device"]
        )
        return torch.nn.Parameter(tensor, requires_grad=False) if value["is_parameter"] else tensor


def _class_to_json(path: str, cls: Any) -> tuple[str, str, str]:
    if isinstance(cls, type):
        return path, cls.__module__, cls.__qualname__
    module, _, name = str(cls).rpartition(".")
    return path, module, name


def _class(module: str, name: str) -> type:
    """Returns the class, or an empty class of its name if it cannot be imported; tuple order is unknown then."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        return type(name, (torch.nn.Module,), {})


def _name_of(function: Any) -> str:
    """Returns the qualified name of a function; for Dynamo's wrappers of NumPy functions, `wrapper(name)`."""
    if type(function) in _NUMPY_WRAPPERS:
        held = vars(function)[_NUMPY_WRAPPERS[type(function)]]
        return f"{type(function).__name__}({held if isinstance(held, str) else _get_qualified_name(held)})"
    return _get_qualified_name(function)


def _function(name: str) -> Any:
    """Returns the function with a qualified name such as `torch.nn.functional.linear`."""
    outer, parenthesis, inner = name.removesuffix(")").partition("(")
    if parenthesis:
        wrapper = next(kind for kind in _NUMPY_WRAPPERS if kind.__name__ == outer)
        return wrapper(inner if wrapper is numpy_method_wrapper else _function(inner))
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
            for part in parts[i:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError):
            continue
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise ImportError(
        f"cachedit_fx: the graph calls {name!r}, which the installed packages do not have; install the packages of "
        "the model"
    )


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _set_attribute(root: torch.nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            setattr(root, part, torch.nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)
