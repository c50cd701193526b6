"""What becomes of the streams where two lists meet, done anew to the streams at a cut. Reads only, until it is told to.

    text, image -> list 1 -> text', image' -> cat -> joint -> list 2

A region that begins in list 1 and ends in list 2 is entered by `text, image` and left by `joint'`. Its residual is
taken against `cat(text, image)`, which the model itself never computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.writes import is_in_place
from cachedit_fx.patterns.nodes import same_shape

Step = tuple[fx.Node, fx.Node | None]


@dataclass(frozen=True, slots=True)
class StreamJoins:
    """How a value would follow from the streams at a cut.

    Attributes:
        steps: In the order in which they are done: (node, None) is copied, (node, other) has the value of `other`. The
            last one is the value.
    """

    steps: tuple[Step, ...]

    def into(self, graph: fx.Graph, take: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Appends the copies to `graph`, in which `take` finds what was made before the cut; returns the value."""
        done: dict[fx.Node, fx.Node] = {}

        def probe(node: fx.Node) -> fx.Node:
            return done[node] if node in done else take(node)

        for node, same_as in self.steps:
            if same_as is not None:
                done[node] = probe(same_as)
                continue
            done[node] = graph.node_copy(node, probe)
            done[node].meta.pop("cachedit_block", None)
            done[node].meta["cachedit_probe"] = True
        return done[self.steps[-1][0]]


def find_stream_joins(
    program: Program,
    start: int,
    before: Mapping[str, fx.Node],
    meetings: Sequence[tuple[Mapping[str, fx.Node], Mapping[str, fx.Node]]],
) -> dict[str, tuple[fx.Node, StreamJoins]]:
    """The streams that enter the last of some lists, with how they follow from the streams `before` a cut.

    Only what costs nothing to do again is (no matrix products); a stream for which that is not enough is missing.

    Args:
        start: Position of the cut.
        meetings: For each two lists that meet behind the cut, what leaves the one and what enters the other.
    """
    now: dict[str, tuple[fx.Node, tuple[Step, ...]]] = {role: (node, ()) for role, node in before.items()}
    for leaving, entering in meetings:
        known = {node: now[role] for role, node in leaving.items() if role in now and same_shape(now[role][0], node)}
        then: dict[str, tuple[fx.Node, tuple[Step, ...]]] = {}
        for role, entry in entering.items():
            found = _moves(program, start, entry, set(known))
            if found is not None:
                moves, read = found
                steps = [step for node in read for step in (*known[node][1], (node, known[node][0]))]
                then[role] = (entry, (*dict.fromkeys(steps), *((node, None) for node in moves)))
        now = then
    return {role: (node, StreamJoins(steps)) for role, (node, steps) in now.items() if steps}


def _moves(
    program: Program, start: int, entry: fx.Node, leaving: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """What makes `entry`, of which of the `leaving` streams and of what was made before the cut, in order.

    None if blocks are needed for it.
    """
    found, read, todo = set(), set(), [entry]
    while todo:
        node = todo.pop()
        if node in leaving:
            read.add(node)
        elif node not in found and program.position[node] >= start:
            is_call = node.op in ("call_function", "call_method")
            if not is_call or is_in_place(node) or program.flops[program.position[node]]:
                return None
            found.add(node)
            todo += node.all_input_nodes
    in_order = program.position.__getitem__
    return sorted(found, key=in_order), sorted(read, key=in_order)
