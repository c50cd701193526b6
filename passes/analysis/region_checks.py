"""Refuses a region whose writes or contexts a reused step would miss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from torch import fx

from cachedit_fx.passes.analysis.contexts import setter_at
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.writes import written_between, written_outside
from cachedit_fx.passes.region import mismatch_error
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match
from cachedit_fx.patterns.nodes import call_text


def check_state(program: Program, match: Match, cuts: Iterable[int], hoisted: AbstractSet[fx.Node]) -> None:
    """Checks that every node runs in the same state as in the model.

    Args:
        cuts: Positions of the cuts.
        hoisted: Nodes that move to the head.

    Raises:
        MismatchError: A hoisted node lies in a context such as autocast, or a state is set next to a cut.
    """
    moved = next(iter(hoisted & program.within_contexts), None) if hoisted else None
    if moved is not None:
        expected = f"{moved.name}, which does not depend on a stream, outside of contexts such as autocast"
        found = f"{moved.name} inside of a context, where it would run in another state before the region"
        raise mismatch_error(match, Cause.STATE, expected, found, moved)
    setter = next(filter(None, (setter_at(program.nodes, cut) for cut in cuts)), None)
    if setter is not None:
        expected, found = "blocks that begin and end in the same state", f"`{call_text(setter)}` between two blocks"
        raise mismatch_error(match, Cause.STATE, expected, found, setter)


def check_writes(program: Program, match: Match, probed_since: fx.Node | None, nodes: Sequence[fx.Node]) -> None:
    """Checks that the region writes only into values of its own, and that no Fn block writes into `probed_since`.

    Args:
        probed_since: As in `Region`.
        nodes: The nodes of the region.

    Raises:
        MismatchError: There is such a write.
    """
    first, region = match.blocks.blocks[0].start, program.position[nodes[0]]
    written = written_outside(program, list(nodes))
    if probed_since is not None:
        written = written or written_between(program, probed_since, first, region)
    if written is not None:
        expected, found = "streams that are not written in place", f"`{call_text(written)}`"
        raise mismatch_error(match, Cause.IN_PLACE, expected, found, written)
