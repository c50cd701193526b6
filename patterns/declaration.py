"""What a user says of one transformer's blocks; its graph is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from cachedit_fx.config.cache_config import Changes
from cachedit_fx.patterns.template import BlockTemplate


class Rewriter(Protocol):
    """Changes a captured graph before anything is looked for in it. Equal ones do the same to every graph."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """The graph to go on with; its placeholders are those of `gm`."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is known beforehand. All of it is optional: the default declares nothing.

    Attributes:
        lists: Paths of the block lists to cache, as in `transformer_blocks`; empty for those that the graph shows.
        patterns: One per list; with `lists` empty at most one, which every list to be cached has to fit.
        overrides: One per list, or one for all: what a region does differently. With any of them each list has its own.
        is_checked: Hold the patterns against the dataflow; otherwise they are taken for a remark.
        functor: Applied to the captured graph first.
    """

    lists: tuple[str, ...] = ()
    patterns: tuple[BlockTemplate, ...] = ()
    overrides: tuple[Changes | None, ...] = ()
    is_checked: bool = True
    functor: Rewriter | None = None

    def pattern_for(self, path: str) -> BlockTemplate | None:
        """The pattern that the list at `path` has to fit; None if any will do."""
        if not self.patterns or not self.is_checked:
            return None
        return self.patterns[self.lists.index(path)] if self.lists else self.patterns[0]

    @property
    def has_overrides(self) -> bool:
        return any(override is not None for override in self.overrides)
