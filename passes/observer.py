"""The observer of the passes over one graph. This one ignores everything; `explain` and `debug_dir` have others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Match, Mismatch

if TYPE_CHECKING:
    from cachedit_fx.passes.analysis.dataflow import Program
    from cachedit_fx.passes.piece import Piece
    from cachedit_fx.passes.plan import Plan


class Observer:
    """Is notified of every result, in order. It must not change what it is given, because the next pass uses it."""

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """The graph after the pass `name`. The first one is the captured graph, with the name "captured"."""

    def lists(self, program: Program, found: Sequence[BlockList], chain: Sequence[BlockList]) -> None:
        """The block lists that were found, and those of them that are the chain."""

    def matched(self, match: Match) -> None:
        """The template that a list of the chain fits."""

    def mismatched(self, blocks: BlockList, mismatches: Sequence[Mismatch]) -> None:
        """Why the declared template, or every template, does not fit a list of the chain, nearest mismatch first."""

    def planned(self, plan: Plan) -> None:
        """The plan."""

    def refused(self, mismatches: tuple[Mismatch, ...]) -> None:
        """Why the graph cannot be cached, the nearest miss first."""

    def pieces(self, cached_graph: fx.GraphModule, pieces: Sequence[Piece]) -> None:
        """The pieces to compile, and the cached graph whose segments call them."""

    def finish(self, gm: fx.GraphModule) -> None:
        """The end of the passes."""

    def fail(self) -> None:
        """A pass raised the exception that is being handled."""


# Creates the observer for `debug_dir`. `cachedit_fx.inspect.dumps` sets it, because passes must not import inspect.
new_dump: Callable[[str, CacheConfig, Declaration], Observer] | None = None


def observer_for(cls: str, config: CacheConfig, declared: Declaration) -> Observer:
    """The observer for the graph of a module of class `cls`.

    Raises:
        ConfigError: `debug_dir` cannot be created or written to.
    """
    return new_dump(cls, config, declared) if config.debug_dir is not None and new_dump is not None else Observer()
