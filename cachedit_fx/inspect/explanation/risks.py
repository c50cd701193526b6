"""Lists the arguments that a graph is specialized on, from Dynamo's guards."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from cachedit_fx.inspect.explanation.data import RiskReport

_LENGTHS = ("SEQUENCE_LENGTH", "LIST_LENGTH", "DICT_KEYS", "DICT_LENGTH")


def risks_of(guards: Sequence[Any], arguments: Collection[str]) -> tuple[RiskReport, ...]:
    """Returns the arguments of the call that the guards check, each once. What the model holds is not included.

    Another size, number or string, or an argument that is present or missing, triggers a recompilation.

    Args:
        guards: The `GuardFilterEntry` objects of one graph.
        arguments: The names of the parameters of the forward.
    """
    found: dict[str, RiskReport] = {}
    for guard in guards:
        name = _label(guard.name)
        is_argument = re.split(r"\W", name, maxsplit=1)[0] in arguments and name not in ("args", "kwargs")
        if guard.is_global or not guard.has_value or not is_argument:
            continue
        risk = _risk(name, guard.value, guard.guard_type)
        if risk is not None:
            found.setdefault(name, risk)
    return tuple(found.values())


def _risk(what: str, value: Any, guard_type: str) -> RiskReport | None:
    if isinstance(value, torch.Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return RiskReport(
            what,
            text,
            "a new size triggers one recompilation, and that dimension is dynamic afterwards; every new dtype, device "
            "or number of dimensions triggers a recompilation",
        )
    if value is None or isinstance(value, bool | str):
        return RiskReport(what, repr(value), "every new value triggers a recompilation")
    if isinstance(value, int | float):
        return RiskReport(
            what, repr(value), "a new value triggers a recompilation, and the number may be dynamic afterwards"
        )
    if guard_type in _LENGTHS and hasattr(value, "__len__"):
        return RiskReport(
            what, f"{type(value).__name__} of {len(value)}", "every new length or key triggers a recompilation"
        )
    return None


def _label(source: str) -> str:
    """Shortens the source of a guard: `kwargs['timestep']` to `timestep`, and `a['b'][0]` to `a[b][0]`."""
    bare = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    name = re.sub(r"^kwargs\['(\w+)'\]", r"\1", bare)
    return name.replace("'", "").replace('"', "")
