"""What forbids a region: a state that would be another, a write that would be missed. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from torch import fx

from cachedit_fx.passes.analysis.contexts import setter_at
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.writes import written_between, written_outside
from cachedit_fx.passes.region import mismatch_of
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch
from cachedit_fx.patterns.nodes import call_text


def check_state(program: Program, match: Match, cuts: Iterable[int], hoisted: AbstractSet[fx.Node]) -> Mismatch | None:
    """Nothing may run in another state than in the model: neither what moves to the head, nor what follows a cut."""
    moved = next(iter(hoisted & program.within_contexts), None) if hoisted else None
    if moved is not None:
        detail = f"expected {moved.name}, which does not depend on a stream, to be made outside a context as autocast"
        return mismatch_of(match, Cause.STATE, detail, moved)
    setter = next(filter(None, (setter_at(program.nodes, cut) for cut in cuts)), None)
    if setter is not None:
        detail = f"expected blocks that begin and end in one state, found `{call_text(setter)}` between two of them"
        return mismatch_of(match, Cause.STATE, detail, setter)
    return None


def check_writes(
    program: Program, match: Match, probed_since: fx.Node | None, nodes: Sequence[fx.Node]
) -> Mismatch | None:
    """Nothing that is skipped may write into what was made before it, nor the Fn blocks into what they are held to."""
    first, region = match.blocks.blocks[0].start, program.position[nodes[0]]
    written = written_outside(program, list(nodes))
    if probed_since is not None:
        written = written or written_between(program, probed_since, first, region)
    if written is not None:
        detail = f"expected streams that nothing writes into in place, found `{call_text(written)}`"
        return mismatch_of(match, Cause.IN_PLACE, detail, written)
    return None
