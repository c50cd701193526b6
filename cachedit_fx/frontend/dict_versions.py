"""Detects writes to dictionaries by their versions, which is cheaper than to compare their contents.

The attributes and children of a module are in dictionaries. CPython changes the version of a dictionary at every write,
and Dynamo's guards read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachedit_fx.frontend.torch_internals import dict_version


class DictVersions:
    """Remembers the present versions of some dictionaries."""

    __slots__ = ("_dicts", "_versions")

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        self._dicts = [*{id(one): one for one in dicts}.values()]
        self._versions = self._read()

    def are_same(self) -> bool:
        """Whether it is certain that none of them has been written to since."""
        return self._versions is not None and self._read() == self._versions

    def _read(self) -> list[int] | None:
        return [*map(dict_version, self._dicts)] if dict_version is not None else None
