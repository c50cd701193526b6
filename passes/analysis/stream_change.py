"""Finds where a stream gets another shape, so that the next block does not continue it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.patterns.blocks import Block, StreamChange
from cachedit_fx.patterns.nodes import base_name, is_tensor, may_share_shape, same_shape, value_of


def find_stream_change(
    program: Program, blocks: Sequence[Block], boundaries: Sequence[Mapping[str, fx.Node]]
) -> StreamChange | None:
    """The first place, in a block or between two blocks, at which a stream gets another shape; None if there is none.

    The value that replaces the stream is one that depends on it, that later nodes read, and that has the same name; or
    else the last one with the same number of dimensions.
    """
    for i, before in enumerate(boundaries, 1):
        is_last = i >= len(blocks)
        after = boundaries[i] if i < len(boundaries) else {}
        if i > len(blocks) or (is_last and after):  # A stream need not be used after the last block.
            return None
        end = len(program.nodes) if is_last else blocks[i].span_end
        for name, stream in before.items():
            found = _changed(program, blocks[i - 1], stream, end, {*after.values()}) if name not in after else None
            if found is not None:
                is_between = program.position[found[0]] >= blocks[i - 1].end
                role = name if len(boundaries) > len(blocks) else base_name(stream)  # Roles are assigned at the end.
                return StreamChange(i, role, stream, *found, is_between)
    return None


def _changed(
    program: Program, block: Block, stream: fx.Node, end: int, others: set[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """The first value with another shape than a stream that enters a block, and the value that is handed on instead."""
    derived = program.descendants_within({stream}, block.start, block.span_end)
    handed_on = [
        node
        for node in derived - others
        if is_tensor(node)
        and program.used_in(node, block.span_end, end)
        and value_of(node).dim() == value_of(stream).dim()
        and not may_share_shape(node, stream)
    ]
    if not handed_on:
        return None
    last = max(handed_on, key=lambda node: (base_name(node) == base_name(stream), program.position[node]))
    first = last
    while True:
        sources = [node for node in first.all_input_nodes if node is stream or (node in derived and is_tensor(node))]
        if not sources or any(may_share_shape(node, stream) for node in sources):
            return first, last
        # Of `x + f(x)`, the first operand: the other one is computed from it.
        first = min(sources, key=lambda node: (not same_shape(node, last), program.position[node]))
