"""Finds how streams are joined between two lists, so that the streams at a cut can be joined in the same way.

    text, image -> list 1 -> text', image' -> cat -> joint -> list 2 -> joint'

`text` and `image` enter a region that begins in list 1 and ends in list 2, and `joint'` leaves it. Its residual is
`joint' - cat(text, image)`. The model itself does not compute this `cat`.
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
    """How a value follows from the streams at a cut.

    Attributes:
        steps: In execution order. For (node, None), a copy of the node is executed; for (node, other), `other` takes
            the place of the node. The last node is the value.
    """

    steps: tuple[Step, ...]

    def into(self, graph: fx.Graph, take: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Appends the copies to `graph` and returns the value. `take` maps values from before the cut to `graph`."""
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
    """The streams that enter the last list, with how they follow from the streams `before` a cut.

    Only operations without FLOPs are executed again. A stream that needs others is missing from the result.

    Args:
        start: Position of the cut.
        meetings: For each pair of consecutive lists after the cut, the streams that leave the first list and those that
            enter the second.
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
    """The nodes after the cut that compute `entry`, and the `leaving` streams that they read, both in program order.

    None if one of the nodes writes in place or has FLOPs, or is not a call.
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
