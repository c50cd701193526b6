"""Records what the passes report about one graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cachedit_fx.inspect.explanation.graphs import snapshot
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.piece import Piece
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.mismatch import Match, Mismatch


class Trace(Observer):
    """The results of the passes over one graph. Results of passes that did not run are empty or None.

    Attributes:
        before: The captured graph.
        program: The graph that the analyses read.
        found: The block lists of this graph.
        chain: Those of them that form the chain.
        matches: The template that each list fits, by the path of the list.
        mismatches: Why templates do not fit, nearest miss first, or why nothing can be cached.
        plan: The regions, and what else the analyses found.
        after: The cached graph, before its segments are split into pieces.
        piece_list: The pieces.
        segments: The names of the segments, by the id of the module.
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
        if name == InsertConditionals.name:
            self.after = snapshot(gm)

    def lists(self, program: Program, found: Sequence[BlockList], chain: Sequence[BlockList]) -> None:
        self.program, self.found, self.chain = program, tuple(found), tuple(chain)

    def matched(self, match: Match) -> None:
        self.matches[match.blocks.path] = match

    def mismatched(self, blocks: BlockList, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = (*self.mismatches, *mismatches)

    def planned(self, plan: Plan) -> None:
        self.plan = plan

    def pieces(self, cached_graph: fx.GraphModule, pieces: Sequence[Piece]) -> None:
        self.piece_list = tuple(pieces)
        self.segments = {id(module): name for name, module in cached_graph.named_children()}

    def refused(self, mismatches: tuple[Mismatch, ...]) -> None:
        self.mismatches, self.piece_list, self.after = mismatches, (), None

    def graphs(self) -> dict[str, fx.GraphModule]:
        """Returns the graphs by name: "before", and, if the graph is cached, "after" and its segments."""
        assert self.before is not None
        found = {"before": self.before}
        if self.after is not None:
            found["after"] = self.after
            found |= {name: part for name, part in self.after.named_children() if isinstance(part, fx.GraphModule)}
        return found
