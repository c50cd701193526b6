"""Detects writes to dictionaries by their versions, which is cheaper than to compare their contents.

The attributes and children of a module are in dictionaries. CPython changes the version of a dictionary at every write,
and Dynamo's guards read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cachedit_fx.frontend.torch_internals import dict_version, guard_on_dict_versions

# After so many calls without a write, the check is made by Dynamo's guards. To make them costs as much as hundreds of
# checks, which would be wasted on a model that writes to its attributes at every call.
CALLS_BEFORE_GUARDS = 16


class DictVersions:
    """Remembers the present versions of some dictionaries."""

    __slots__ = ("_dicts", "_guards", "_num_calls", "_versions")

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        self._dicts = [*{id(one): one for one in dicts}.values()]
        self._guards: Callable[[list[dict[Any, Any]]], bool] | None = None
        self._num_calls = 0
        self._versions = self._read()

    def are_same(self) -> bool:
        """Whether it is certain that none of them has been written to since."""
        if self._guards is not None:
            return self._guards(self._dicts)
        self._num_calls += 1
        guards = guard_on_dict_versions(self._dicts) if self._num_calls == CALLS_BEFORE_GUARDS else None
        are_same = self._versions is not None and self._read() == self._versions
        if are_same:  # Nothing was written before the guards were made, which hold the versions of that moment.
            self._guards = guards
        return are_same

    def _read(self) -> list[int] | None:
        return [*map(dict_version, self._dicts)] if dict_version is not None else None
