"""Follows one graph through the passes and keeps what there is to see."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cachedit_fx.inspect.explanation.graphs import snapshot
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.insert_conditionals import CachedGraph
from cachedit_fx.passes.transforms.split_pieces import Piece
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.mismatch import Match, Mismatch


class Trace(Observer):
    """What became of a graph.

    Attributes:
        before: As captured. All else is empty (or None) where the way did not get so far.
        program: The tidied graph; `found` and `chain` are block lists in it.
        matches: Path of a list -> the template that it fits.
        mismatches: Why templates do not fit, nearest miss first; or why nothing can be cached.
        plan: What was decided on.
        after: The cached graph, its segments whole.
        piece_list: What would be compiled.
        segments: Names of the segments, by the object that calls a piece.
    """

    def __init__(self) -> None:
        self.before: fx.GraphModule | None = None
        self.program: Program | None = None
        self.found: tuple[BlockList, ...] = ()
        self.chain: tuple[BlockList, ...] = ()
        self.matches: dict[str, Match] = {}
        self.mismatches: tuple[Mismatch, ...] = ()
        self.plan: Plan | None = None
        self.after: fx.GraphModule | None = None
        self.piece_list: tuple[Piece, ...] = ()
        self.segments: dict[int, str] = {}

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        if self.before is None:
            self.before = snapshot(gm)

    def lists(self, program: Program, found: Sequence[BlockList], chain: Sequence[BlockList]) -> None:
        self.program, self.found, self.chain = program, tuple(found), tuple(chain)

    def matched(self, match: Match) -> None:
        self.matches[match.blocks.path] = match

    def mismatched(self, blocks: BlockList, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = (*self.mismatches, *mismatches)

    def planned(self, plan: Plan | tuple[Mismatch, ...]) -> None:
        if isinstance(plan, Plan):
            self.plan = plan
        else:
            self.mismatches = plan

    def rewritten(self, cached_graph: CachedGraph) -> None:
        self.after = snapshot(cached_graph.gm)

    def pieces(self, cached_graph: CachedGraph, pieces: Sequence[Piece]) -> None:
        self.piece_list = tuple(pieces)
        self.segments = {id(module): name for name, module in cached_graph.gm.named_children()}

    def refuse(self, mismatches: tuple[Mismatch, ...]) -> None:
        """The graph is not cached after all, for a reason that no pass knows."""
        self.mismatches, self.piece_list, self.after = mismatches, (), None

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The graphs by name: "before"; "after" and its segments where the graph is cached."""
        assert self.before is not None
        found = {"before": self.before}
        if self.after is not None:
            found["after"] = self.after
            found |= {name: part for name, part in self.after.named_children() if isinstance(part, fx.GraphModule)}
        return found
