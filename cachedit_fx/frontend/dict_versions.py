"""Whether dictionaries have been written to: a look at hundreds of them costs less than a look at what they hold.

The attributes and children of a module are dictionaries. The interpreter numbers the writes to every dictionary, and
Dynamo's guards can read that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Private to torch; there since 2.0. Without it nothing is known to be unwritten, and callers look for themselves.
_version_of: Callable[[dict[Any, Any]], int] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "dict_version", None
)


class DictVersions:
    """Remembers dictionaries as they are now, by their versions."""

    __slots__ = ("_dicts", "_known")

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        self._dicts = [*{id(one): one for one in dicts}.values()]
        self._known = self._look()

    def are_same(self) -> bool:
        """Whether nothing was written to any of them since. If not, what they hold may be the same all the same."""
        return self._known is not None and self._look() == self._known

    def _look(self) -> list[int] | None:
        return [*map(_version_of, self._dicts)] if _version_of is not None else None
