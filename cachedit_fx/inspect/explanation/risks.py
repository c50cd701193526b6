"""What a graph was specialised on, read off Dynamo's guards."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from cachedit_fx.inspect.explanation.data import RiskReport

_LENGTHS = ("SEQUENCE_LENGTH", "LIST_LENGTH", "DICT_KEYS", "DICT_LENGTH")


def risks_of(guards: Sequence[Any], arguments: Collection[str]) -> tuple[RiskReport, ...]:
    """The arguments of the call that the guards look at, each once; nothing that the model holds.

    A size, a number, a string or an argument that is there or not: another one compiles once more.

    Args:
        guards: `GuardFilterEntry`s of one graph.
        arguments: Names of the forward's parameters.
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
            "another size compiles once more, and the size is dynamic from then on; another dtype, device or number "
            "of dimensions compiles each time",
        )
    if value is None or isinstance(value, bool | str):
        return RiskReport(what, repr(value), "another value compiles each time")
    if isinstance(value, int | float):
        return RiskReport(what, repr(value), "another value compiles once more; it may be dynamic from then on")
    if guard_type in _LENGTHS and hasattr(value, "__len__"):
        return RiskReport(what, f"{type(value).__name__} of {len(value)}", "another length or key compiles each time")
    return None


def _label(source: str) -> str:
    """`kwargs['timestep']` -> `timestep`; `a['b'][0]` -> `a[b][0]`."""
    bare = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    name = re.sub(r"^kwargs\['(\w+)'\]", r"\1", bare)
    return name.replace("'", "").replace('"', "")
