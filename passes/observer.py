"""Who is told of a graph's way through the passes. By itself it does nothing; `explain` and `debug_dir` do."""

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
    from cachedit_fx.passes.plan import Plan
    from cachedit_fx.passes.transforms.insert_conditionals import CachedGraph
    from cachedit_fx.passes.transforms.split_pieces import Piece


class Observer:
    """Gets every step of the way in turn. What it is given goes on to the next pass: read or copy it."""

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """The graph behind a pass; the first is "captured"."""

    def lists(self, program: Program, found: Sequence[BlockList], chain: Sequence[BlockList]) -> None:
        """The block lists, and which of them make up the chain."""

    def matched(self, match: Match) -> None:
        """The template that a list of the chain fits."""

    def mismatched(self, blocks: BlockList, mismatches: Sequence[Mismatch]) -> None:
        """Why the declared template, or every template, does not fit a list of the chain, nearest mismatch first."""

    def planned(self, plan: Plan | tuple[Mismatch, ...]) -> None:
        """The end of all that only reads."""

    def rewritten(self, cached_graph: CachedGraph) -> None:
        """The graph with its conditionals in, its segments still whole."""

    def pieces(self, cached_graph: CachedGraph, pieces: Sequence[Piece]) -> None:
        """The cached graph, its segments cut into the pieces that will be compiled."""

    def finish(self, gm: fx.GraphModule, reasons: tuple[Mismatch, ...] = ()) -> None:
        """The end of the way. `reasons` are those that no pass knows."""

    def fail(self) -> None:
        """A pass raised the exception that is handled now."""


# Who is told where `debug_dir` is set. `cachedit_fx.inspect.dumps` puts it here: nothing imports what renders.
new_dump: Callable[[str, CacheConfig, Declaration], Observer] | None = None


def observer_for(cls: str, config: CacheConfig, declared: Declaration) -> Observer:
    """Who is told of the graph of a module of class `cls`.

    Raises:
        ConfigError: `debug_dir` cannot be made or written to.
    """
    return new_dump(cls, config, declared) if config.debug_dir is not None and new_dump is not None else Observer()
