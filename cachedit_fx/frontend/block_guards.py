"""What the trace of a block depends on in its module: the guards on values below it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cachedit_fx.frontend.trace_internals import ModuleCall, SourcesBelow, UnknownError, guard_of, name_of, source_of

# Guards. For each kind, whether a guard that holds for one value holds for another, if it is made for it.


def _is(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return old is new


def _equal(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return old is new or (type(old) is type(new) and repr(old) == repr(new) and bool(old == new))


def _same_type(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return type(old) is type(new)


def _same_length(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return type(old) is type(new) and len(old) == len(new)


def _same_keys(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return type(old) is type(new) and [*map(_key, old)] == [*map(_key, new)]


def _key(key: Any) -> Hashable:
    return (type(key), key) if isinstance(key, str | int | bool | None) else id(key)


def _contains(old: Any, new: Any, parameters: dict[str, Any]) -> bool:
    return (parameters["key"] in old) == (parameters["key"] in new)


def _in_attributes(old: Any, new: Any, parameters: dict[str, Any]) -> bool:
    return (parameters["attr"] in vars(old)) == (parameters["attr"] in vars(new))


def _has_attribute(old: Any, new: Any, parameters: dict[str, Any]) -> bool:
    return hasattr(old, parameters["attr"]) == hasattr(new, parameters["attr"])


def _same_tensor_kind(old: Any, new: Any, _: dict[str, Any]) -> bool:
    return _weight_kind(old) == _weight_kind(new)


def _weight_kind(tensor: Any) -> Hashable:
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
        raise UnknownError("a weight is not a plain tensor")
    marks = {name: value for name, value in vars(tensor).items() if name.startswith("_dynamo")}
    marks.pop("_dynamo_static_input_type", None)  # Dynamo sets it when it wraps the weight.
    if marks or tensor.grad is not None or tensor._is_view():
        raise UnknownError("a weight has a gradient, is a view or has dynamic sizes")
    is_inference = tensor.is_inference()
    return (
        type(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        is_inference,
    )


CHECKS: dict[str, Callable[[Any, Any, dict[str, Any]], bool]] = {
    "BUILTIN_MATCH": _is,
    "CLASS_MATCH": _is,
    "CLOSURE_MATCH": _is,
    "CONSTANT_MATCH": _equal,
    "DICT_CONTAINS": _contains,
    "DICT_KEYS_MATCH": _same_keys,
    "DICT_NOT_CONTAINS": _contains,
    "DUPLICATE_INPUT": _is,
    "EMPTY_NN_MODULE_HOOKS_DICT": _same_keys,
    "EQUALS_MATCH": _equal,
    "FUNCTION_MATCH": _is,
    "HASATTR": _has_attribute,
    "ID_MATCH": _is,
    "MAPPING_KEYS_CHECK": _same_keys,
    "MODULE_MATCH": _is,
    "NONE_MATCH": _is,
    "NOT_PRESENT_IN_GENERIC_DICT": _in_attributes,
    "SEQUENCE_LENGTH": _same_length,
    "SET_CONTAINS": _contains,
    "TENSOR_MATCH": _same_tensor_kind,
    "TYPE_MATCH": _same_type,
}


@dataclass(frozen=True, slots=True)
class BlockGuard:
    """A guard on the value of a source below a block."""

    guard: Any
    source: Any
    kind: str
    parameters: dict[str, Any]
    value: Any


def guards_below(call: ModuleCall, is_below: SourcesBelow, known: set[Any], values: dict[Any, Any]) -> list[BlockGuard]:
    """The guards on values below a block.

    Args:
        known: The guards that existed before the block was traced.
        values: What is known of the values at sources.

    Raises:
        UnknownError: A guard cannot be compared with that of another block.
    """
    found, modules = {}, {*map(id, call.module.modules())}
    for guard in call.guards():
        source, (kind, parameters) = source_of(guard), guard_of(guard)
        value = call.value_at(source, values) if is_below(source) else None
        if not is_below(source):
            if guard not in known:
                other = parameters.get("source_b")
                is_block = id(_value_or_none(call, source, values)) in modules
                if is_block or (other is not None and is_below(other)):
                    raise UnknownError(f"it is found at {name_of(source)}, too")
            continue
        constants = all(isinstance(parameter, str | int | None) for parameter in parameters.values())
        if kind not in CHECKS or not (constants or kind in ("DUPLICATE_INPUT", "TENSOR_MATCH")):
            raise UnknownError(f"it depends on a guard of the kind {kind}")
        if kind == "DUPLICATE_INPUT" and isinstance(value, torch.Tensor):
            raise UnknownError("it shares a weight")
        key = (source, kind, *sorted((name, str(parameter)) for name, parameter in parameters.items()))
        found[key] = BlockGuard(guard, source, kind, parameters, value)
    return [*found.values()]


def _value_or_none(call: ModuleCall, source: Any, values: dict[Any, Any]) -> Any:
    try:
        return call.value_at(source, values)
    except Exception:  # The source of a guard on a setting of torch is not an expression.
        return None
