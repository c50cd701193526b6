"""Whether dictionaries have been written to: to ask this of hundreds of them costs less than to compare their contents.

The attributes and children of a module are dictionaries. The interpreter numbers the writes to every dictionary, and
Dynamo's guards compare these numbers in compiled code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Private to torch. Without it no dictionary is known to be unwritten, and callers compare the contents.
_guards = getattr(torch._C._dynamo, "guards", None)


class DictVersions:
    """Remembers dictionaries as they are now, by their versions."""

    __slots__ = ("_dicts", "_root")

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        self._dicts = tuple({id(one): one for one in dicts}.values())
        self._root = _guards_on(self._dicts)

    def are_same(self) -> bool:
        """Whether nothing was written to any of them since. If not, their contents may still be the same."""
        return self._root is not None and bool(self._root.check(self._dicts))


def _guards_on(dicts: tuple[dict[Any, Any], ...]) -> Any:
    """One guard for each dictionary, under a root that is checked with `dicts`; None where torch has no such guards."""
    try:
        root = _guards.RootGuardManager()  # type: ignore[union-attr]
        for number, one in enumerate(dicts):
            found = root.tuple_getitem_manager(number, "", one, torch._dynamo.guards.GuardManagerType.GUARD_MANAGER)
            found.add_dict_version_guard(one, ["dictionary version"], None)
    except (AttributeError, TypeError):
        return None
    return root
