"""Finds the module calls that a graph consists of, and which of them are blocks of one list."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from cachedit_fx.passes.analysis.dataflow import Program

_TOKEN = re.compile(r"\['([^']+)'\]|\.?([A-Za-z_]\w*|\d+)|\[(\d+)\]")
_ROOT = re.compile(r"^[LG]\['(?:args'\]\[\d+\]|\w+'\](?!\[))")  # A local variable, but not an element of a list.
# The way to the module behind a hook that has replaced its `forward`.
_HOOKED = re.compile(r"\.forward\b.*?\.__self__\b")
_NOT_NAMES = {"L", "self", "__dict__", "_modules", "getattr"}
Path = tuple[str, ...]


@dataclass(slots=True)
class Call:
    """One call of a module.

    Attributes:
        path: Path of the module.
        cls: Class of the module; None if Dynamo did not record it.
        number: Number of earlier calls of the same module.
        positions: Positions of its nodes, in program order.
        has_inner: Whether any of its nodes belongs to a submodule.
    """

    path: Path
    cls: type | None
    number: int
    positions: list[int]
    has_inner: bool = False

    @property
    def start(self) -> int:
        return self.positions[0]


def module_lists(program: Program) -> dict[Path, list[Call]]:
    """Path of a list -> its module calls, in the order of their first nodes. Nested lists are included.

    A list consists of the elements of an `nn.ModuleList` or `nn.Sequential` (`blocks.0`, `blocks.1`), of modules with
    numbered names (`layer1`, `layer2`: the list `layer`), or of the calls of one module that is called repeatedly. In a
    list of lists (`layers.0.0`, `layers.0.1`), the blocks are lists, which are never called themselves.
    """
    calls = _module_calls(program)
    by_path: dict[Path, list[Call]] = defaultdict(list)
    for (path, _), call in calls.items():
        by_path[path].append(call)
    again = {path for path, number in calls if number > 0}
    lists: dict[Path, list[Call]] = defaultdict(list)
    for (path, _), call in calls.items():
        named = _list_of(path)
        if named is not None:
            lists[named].append(call)
    for path in again - set(lists):  # A module that contains a list may be called twice. Then the list is used.
        if not path[-1].isdigit():
            lists[path] = by_path[path]
    return {path: found for path, found in lists.items() if _is_list(found)}


def _module_calls(program: Program) -> dict[tuple[Path, int], Call]:
    """Path and number of a call -> the call, in the order of their first nodes."""
    calls: dict[tuple[Path, int], Call] = {}
    holders: dict[tuple[Path, int], Call] = {}  # Numbered modules that contain others.
    paths: dict[str, Path] = {}
    for position, node in enumerate(program.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue  # The stack of a placeholder is that of its first user.
        outer = None
        for key, (raw, cls) in (node.meta.get("nn_module_stack") or {}).items():
            if raw not in paths:
                paths[raw] = module_path(raw)
            path, number = paths[raw], _call_number(key)
            if not path:
                continue
            call = calls.setdefault((path, number), Call(path, cls if isinstance(cls, type) else None, number, []))
            call.positions.append(position)
            if outer is not None:
                outer.has_inner = True
            outer = call
            for end in range(1, len(path)):
                if path[end - 1].isdigit():
                    held = holders.setdefault((path[:end], number), Call(path[:end], None, number, [], has_inner=True))
                    if position not in held.positions[-1:]:
                        held.positions.append(position)
    called = {path for path, _ in calls}
    calls |= {key: call for key, call in holders.items() if key[0] not in called}
    return dict(sorted(calls.items(), key=lambda item: item[1].start))


def _call_number(key: str) -> int:
    """The number of earlier calls: Dynamo's key of a module that was called before ends in `@1`, `@2` and so on."""
    return int(key.rpartition("@")[2]) if "@" in key else 0


def _list_of(path: Path) -> Path | None:
    """The path of the list that a module is part of, by its name; None if the name has no number."""
    name = path[-1]
    stem = name.rstrip("0123456789").rstrip("_")
    if stem == name:
        return None
    return (*path[:-1], stem) if stem else path[:-1] or None


def _is_list(calls: list[Call]) -> bool:
    """Whether the calls may be blocks. `norm1` and `norm2`, or an activation that is called twice, are not."""
    leaves = [
        call for call in calls if not call.has_inner and getattr(call.cls, "__module__", "").startswith("torch.nn")
    ]
    if len(leaves) == len(calls):  # Linear, SiLU, Linear.
        return False
    if all(call.path[-1].isdigit() for call in calls):
        return True
    return len(calls) > 2 and all(call.has_inner and call.cls is calls[0].cls for call in calls)


def module_path(raw: str) -> Path:
    """The path of a module in Dynamo's notation, without the root, which varies.

    For example ("blocks", "0", "attn") for `L['self'].__dict__['_modules']['blocks'].0.attn`.
    """
    raw = _HOOKED.sub("", _ROOT.sub("", raw))
    tokens = [next(filter(None, groups)) for groups in _TOKEN.findall(raw)]
    for root in ("__self__", "__dict__"):  # `__self__`: a hook calls the forward of the module that it holds.
        if root in tokens:
            tokens = tokens[tokens.index(root) + 1 :]
    return tuple(token for token in tokens if token not in _NOT_NAMES)


def module_path_of(node: fx.Node) -> Path:
    """The path of the innermost module that the node belongs to; () for the forward of the model itself."""
    paths = [module_path(raw) for raw, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return paths[-1] if paths else ()
