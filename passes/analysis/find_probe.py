"""Finds the probe: the tensor whose relative change decides whether a step may reuse.

fn_residual:      what the Fn blocks add to the hidden stream
modulated_input:  norm(x) * (1 + scale(t)) + shift(t), which the first block reads (TeaCache)
timestep, none:   no tensor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_layout
from cachedit_fx.passes.analysis.live_outs import behind, with_parts
from cachedit_fx.passes.analysis.op_tables import (
    EINSUM_NAME,
    REFERENCE_METHODS,
    REFERENCE_PREFIX,
    REFERENCE_SUFFIX,
)
from cachedit_fx.passes.analysis.writes import is_in_place
from cachedit_fx.passes.region import Group, mismatch_error
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.cause import Cause
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


@dataclass(frozen=True, slots=True)
class Probe:
    """The probe of a region.

    Attributes:
        at: The node that is the probe; None if there is no probe.
        since: The node that is subtracted from it; None if `at` itself is the probe.
        moved: Nodes after the cut that compute `at`, in program order. They run in the head.
        sample_dim: As in `Region`.
    """

    at: fx.Node | None = None
    since: fx.Node | None = None
    moved: tuple[fx.Node, ...] = ()
    sample_dim: int | None = None


def find_probe(program: Program, group: Group, timestep: fx.Node | None) -> Probe:
    """The probe for the middle blocks of a group.

    Args:
        timestep: The placeholder of the timestep, if there is one.

    Raises:
        MismatchError: The graph has no such tensor, or computing it in the head would change it.
    """
    fn = group.config.Fn_compute_blocks
    if group.config.probe == "modulated_input":
        probe = _modulated(program, group, timestep)
    elif group.config.probe == "fn_residual" and fn:
        probe = _residual_over(group, fn)
    else:
        return Probe()
    return per_sample(probe, group, timestep)


def per_sample(probe: Probe, group: Group, timestep: fx.Node | None) -> Probe:
    """The probe with a residual diff for each sample, if the configuration asks for it (`batch_decision="any"`).

    The batch is the first dimension. If its length differs from that of the timestep, the batch is the first dimension
    that has this length (tokens first, as in [N, B, D]). A probe of fewer than three dimensions has no batch: it holds
    the tokens of one sample.
    """
    if group.config.batch_decision != "any" or probe.at is None or value_of(probe.at).dim() < 3:
        return probe
    sizes = list(map(size_key, value_of(probe.at).shape))
    batch = size_key(value_of(timestep).shape[0]) if timestep is not None and value_of(timestep).dim() else sizes[0]
    return replace(probe, sample_dim=sizes.index(batch) if batch in sizes[:-1] else 0)


def _residual_over(group: Group, fn: int) -> Probe:
    """The residual of the hidden stream over the Fn blocks, or over as many of them as keep its shape.

    Two lists may be joined by a `cat` of text and image. If the Fn blocks end there, the residual is that of the image
    over the first list. If they extend into the second list, it is the residual over the blocks of the second list.
    """
    streams = group.boundaries
    ends = [match.blocks.boundaries[-1].get(HIDDEN) for match, stop in group.ends if stop == fn]
    for after in (streams[fn][HIDDEN], *ends):
        befores = [stream[HIDDEN] for stream in streams[:fn]]
        # If the sizes are only known to be equal in this call, the subtraction adds a guard that they are equal.
        alike = (
            node for fits in (same_shape, _had_one_shape) for node in befores if after is not None and fits(node, after)
        )
        before = next(alike, None)
        if before is not None and after is not None:
            return Probe(after, before)
    start = streams[0][HIDDEN]
    expected, found = (
        "Fn blocks that keep the shape of the hidden stream",
        f"they change the shape of {describe(start)}",
    )
    raise mismatch_error(group.matches[0], Cause.UNPAIRED, expected, found, stream=HIDDEN)


def _had_one_shape(one: fx.Node, other: fx.Node) -> bool:
    sizes = (*value_of(one).shape, *value_of(other).shape)
    return may_share_shape(one, other) and not any(map(depends_on_data, sizes))


def _modulated(program: Program, group: Group, timestep: fx.Node | None) -> Probe:
    """The input of the first block, normed and modulated by the timestep.

    Source: TeaCache (arXiv:2411.19108), figure 3.
    """
    match, block = group.matches[0], group.blocks[0]
    if timestep is None:
        expected = "a timestep among the inputs of the graph (probe='modulated_input')"
        raise mismatch_error(match, Cause.NO_PROBE, expected, "no input is a timestep")
    stream = group.boundaries[0][HIDDEN]
    found = _first_modulated(program, stream, timestep, block.end)
    if found is None:
        expected = (
            f"a tensor in {block.path} that is {describe(stream)}, modulated by {timestep.name}, before the first "
            "matrix product (probe='modulated_input')"
        )
        raise mismatch_error(match, Cause.NO_PROBE, expected, "there is no such tensor", program.nodes[block.start])
    cut = group.blocks[group.config.Fn_compute_blocks].start
    inside = set(program.nodes_in(cut, block.end))
    moved = with_parts(behind([found], inside), inside) & inside
    written = next(filter(is_in_place, program.nodes[block.start : program.position[found] + 1]), None)
    if written is not None:
        expected = "a modulated input that is computed without a write in place"
        raise mismatch_error(match, Cause.IN_PLACE, expected, f"`{call_text(written)}`", written)
    if moved & program.within_contexts:
        expected = f"{found.name}, the modulated input, outside of contexts such as autocast"
        inside_context = f"{found.name} inside of a context, where it would run in another state before the region"
        raise mismatch_error(match, Cause.STATE, expected, inside_context, found)
    return Probe(found, None, tuple(node for node in program.nodes[cut : block.end] if node in moved))


def _first_modulated(program: Program, stream: fx.Node, timestep: fx.Node, stop: int) -> fx.Node | None:
    """The first value that is read by a matrix product and depends on the stream, without a matrix product in between,
    and on the timestep, other than through the stream. It is the norm after its shift and scale."""
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
    """The nodes that depend on the timestep other than through the stream."""
    found = {timestep}
    for node in nodes:
        if node is not stream and any(arg in found for arg in _values_of(node)):
            found.add(node)
    return found


def _values_of(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values a node reads. Of some it reads only the dtype or the shape (`t.type_as(x)`)."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.endswith(REFERENCE_SUFFIX) or name.startswith(REFERENCE_PREFIX):
        return []
    return node.all_input_nodes[:1] if name in REFERENCE_METHODS else node.all_input_nodes


def _is_like(node: fx.Node, stream: fx.Node) -> bool:
    """Whether a node has the sizes of the stream, and they are known before the call. The dtypes may differ."""
    if not is_tensor(node):
        return False
    sizes, wanted = value_of(node).shape, value_of(stream).shape
    return list(map(size_key, sizes)) == list(map(size_key, wanted)) and not any(map(depends_on_data, sizes))


def _is_contracted(program: Program, node: fx.Node, stop: int) -> bool:
    """Whether a matrix product or convolution reads the node, possibly after layout operations."""
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
    return program.flops[program.position[node]] > 0 or getattr(node.target, "__name__", "") == EINSUM_NAME
