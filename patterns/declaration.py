"""What a user declares about the blocks of one transformer. It is compared with the captured graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from cachedit_fx.config.cache_config import Changes
from cachedit_fx.patterns.template import BlockTemplate


class Rewriter(Protocol):
    """Rewrites a captured graph before it is analyzed. Two equal rewriters rewrite every graph in the same way."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """The rewritten graph, with the same placeholders as `gm`."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is declared about the blocks. Everything is optional; the default declares nothing.

    Attributes:
        lists: Paths of the block lists to cache, for example `transformer_blocks`; empty to use those that are found.
        patterns: One per list. If `lists` is empty: at most one, which every cached list has to fit.
        overrides: One per list, or one for all of them. If there are any, every list has a region of its own.
        is_checked: Whether the patterns are compared with the dataflow; otherwise they have no effect.
        functor: Applied to the captured graph before the analysis.
    """

    lists: tuple[str, ...] = ()
    patterns: tuple[BlockTemplate, ...] = ()
    overrides: tuple[Changes | None, ...] = ()
    is_checked: bool = True
    functor: Rewriter | None = None

    def pattern_for(self, path: str) -> BlockTemplate | None:
        """The pattern that the list at `path` has to fit; None if every pattern is accepted."""
        if not self.patterns or not self.is_checked:
            return None
        return self.patterns[self.lists.index(path)] if self.lists else self.patterns[0]

    @property
    def has_overrides(self) -> bool:
        return any(override is not None for override in self.overrides)
