"""The probe to tell whether a step may reuse. Reads only.

fn_residual:      what the Fn blocks added to the hidden stream
modulated_input:  norm(x) * (1 + scale(t)) + shift(t), as the first block is about to read it (TeaCache)
timestep, none:   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_layout
from cachedit_fx.passes.analysis.live_outs import behind, with_parts
from cachedit_fx.passes.analysis.writes import is_in_place
from cachedit_fx.passes.region import Group, mismatch_of
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.patterns.nodes import (
    call_text,
    depends_on_data,
    describe,
    is_tensor,
    may_share_shape,
    same_shape,
    size_key,
    value_of,
)

_BY_KIND = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # Their second operand tells a dtype or a shape.


@dataclass(frozen=True, slots=True)
class Probe:
    """What a conditional probes.

    Attributes:
        at: A node; None: nothing is looked at.
        since: What is taken off it first; None to look at the value.
        moved: Nodes behind the region's cut that make `at`, in program order: they run with the head.
        sample_dim: As in `Region`.
    """

    at: fx.Node | None = None
    since: fx.Node | None = None
    moved: tuple[fx.Node, ...] = ()
    sample_dim: int | None = None


def find_probe(program: Program, group: Group, timestep: fx.Node | None) -> Probe | Mismatch:
    """What the conditional of a group's middle blocks looks at; a mismatch where the graph has no such thing.

    Args:
        timestep: The placeholder that the blocks are modulated by, if there is one.
    """
    fn = group.config.Fn_compute_blocks
    if group.config.probe == "modulated_input":
        probe = _modulated(program, group, timestep)
    elif group.config.probe == "fn_residual" and fn:
        probe = _residual_over(group, fn)
    else:
        return Probe()
    return per_sample(probe, group, timestep) if isinstance(probe, Probe) else probe


def per_sample(probe: Probe, group: Group, timestep: fx.Node | None) -> Probe:
    """The look with a diff for each sample, if that is asked for (`batch_decision="any"`).

    Samples lie along the first dimension, or where that has another length than the timestep's, along the first that
    has it (tokens first, as in [N, B, D]). What has fewer than three is no batch, but the tokens of one sample.
    """
    if group.config.batch_decision != "any" or probe.at is None or value_of(probe.at).dim() < 3:
        return probe
    sizes = list(map(size_key, value_of(probe.at).shape))
    batch = size_key(value_of(timestep).shape[0]) if timestep is not None and value_of(timestep).dim() else sizes[0]
    return replace(probe, sample_dim=sizes.index(batch) if batch in sizes[:-1] else 0)


def _residual_over(group: Group, fn: int) -> Probe | Mismatch:
    """The hidden stream after the Fn blocks, and before as many of them as keep its shape.

    Two lists may be joined by a `cat` of text and image. If the Fn blocks end there, it is the image as the
    first list left it; if they reach into the second list, the residual is that over its blocks.
    """
    streams = group.boundaries
    ends = [match.blocks.boundaries[-1].get(HIDDEN) for match, stop in group.ends if stop == fn]
    for after in (streams[fn][HIDDEN], *ends):
        befores = [stream[HIDDEN] for stream in streams[:fn]]
        # Where sizes only were equal, taking the residual makes it a guard of the graph that they are.
        alike = (
            node for fits in (same_shape, _had_one_shape) for node in befores if after is not None and fits(node, after)
        )
        before = next(alike, None)
        if before is not None and after is not None:
            return Probe(after, before)
    start = streams[0][HIDDEN]
    detail = f"expected Fn blocks that keep the shape of a stream, found that they change that of {describe(start)}"
    return mismatch_of(group.matches[0], Cause.UNPAIRED, detail)


def _had_one_shape(one: fx.Node, other: fx.Node) -> bool:
    sizes = (*value_of(one).shape, *value_of(other).shape)
    return may_share_shape(one, other) and not any(map(depends_on_data, sizes))


def _modulated(program: Program, group: Group, timestep: fx.Node | None) -> Probe | Mismatch:
    """The first block's input, normed and modulated by the timestep. Source: TeaCache (arXiv:2411.19108), figure 3."""
    match, block = group.matches[0], group.blocks[0]
    if timestep is None:
        detail = "expected a timestep among the graph's inputs (probe='modulated_input'), found none"
        return mismatch_of(match, Cause.NO_PROBE, detail)
    stream = group.boundaries[0][HIDDEN]
    found = _first_modulated(program, stream, timestep, block.end)
    if found is None:
        detail = (
            f"expected {block.path} to modulate {describe(stream)} by {timestep.name} before its first matrix product "
            "(probe='modulated_input'), found none"
        )
        return mismatch_of(match, Cause.NO_PROBE, detail, program.nodes[block.start])
    cut = group.blocks[group.config.Fn_compute_blocks].start
    inside = set(program.nodes_in(cut, block.end))
    moved = with_parts(behind([found], inside), inside) & inside
    written = next(filter(is_in_place, program.nodes[block.start : program.position[found] + 1]), None)
    if written is not None:
        detail = f"expected a modulated input that is made without a write in place, found `{call_text(written)}`"
        return mismatch_of(match, Cause.IN_PLACE, detail, written)
    if moved & program.within_contexts:
        detail = f"expected {found.name}, the modulated input, to be made outside a context as autocast"
        return mismatch_of(match, Cause.STATE, detail, found)
    return Probe(found, None, tuple(node for node in program.nodes[cut : block.end] if node in moved))


def _first_modulated(program: Program, stream: fx.Node, timestep: fx.Node, stop: int) -> fx.Node | None:
    """The first value that is made of the stream without a matrix product, and of the timestep beside the stream, and
    is read by a matrix product: the end of the norm with its shifts and scales."""
    timed = _timed(program.nodes[:stop], stream, timestep)
    plain, mixed = {stream}, set()
    for node in program.nodes[program.position[stream] + 1 : stop]:
        args = _values_of(node)
        if any(arg in mixed for arg in args) or (_contracts(program, node) and any(arg in plain for arg in args)):
            mixed.add(node)
        elif any(arg in plain for arg in args):
            plain.add(node)
            if node in timed and _is_like(node, stream) and _is_contracted(program, node, stop):
                return node
    return None


def _timed(nodes: Sequence[fx.Node], stream: fx.Node, timestep: fx.Node) -> set[fx.Node]:
    """What is made of the timestep, but not by way of the stream."""
    found = {timestep}
    for node in nodes:
        if node is not stream and any(arg in found for arg in _values_of(node)):
            found.add(node)
    return found


def _values_of(node: fx.Node) -> list[fx.Node]:
    """What a node reads values of; of some arguments it reads the dtype or the shape alone (`t.type_as(x)`)."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.endswith("_like") or name.startswith("new_"):
        return []
    return node.all_input_nodes[:1] if name in _BY_KIND else node.all_input_nodes


def _is_like(node: fx.Node, stream: fx.Node) -> bool:
    """Whether a node has the stream's sizes, and these are known before the call; its dtype may be another."""
    if not is_tensor(node):
        return False
    sizes, wanted = value_of(node).shape, value_of(stream).shape
    return list(map(size_key, sizes)) == list(map(size_key, wanted)) and not any(map(depends_on_data, sizes))


def _is_contracted(program: Program, node: fx.Node, stop: int) -> bool:
    """Whether a matrix product (or convolution) reads the node, or what it is after moves and casts."""
    visited, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if program.position[user] >= stop or user in visited:
                continue
            if _contracts(program, user):
                return True
            if is_layout(user):
                visited.add(user)
                todo.append(user)
    return False


def _contracts(program: Program, node: fx.Node) -> bool:
    return program.flops[program.position[node]] > 0 or getattr(node.target, "__name__", "") == "einsum"
