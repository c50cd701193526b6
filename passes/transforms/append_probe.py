"""Appends to a head what the probe vector consists of: the residual diff, the timestep and the checksums."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx

from cachedit_fx.passes.analysis.cached_examples import probe_example
from cachedit_fx.passes.extract import Extract
from cachedit_fx.passes.region import Region
from cachedit_fx.passes.transforms.exchange import NUM_STATE, exchange


def append_distance(head: Extract, region: Region) -> tuple[tuple[fx.Node, fx.Node], fx.Node, fx.Node]:
    """Appends mean(|now - before|) and mean(|before|) of the probe, the two parts of the residual diff.

    They are in float32 for every dtype, because a mean in bfloat16 loses small differences. With `region.sample_dim`,
    there are as many as samples. With `region.groups`, they are sums, to which the other ranks add theirs.

    Returns:
        The two parts, the probe, and the placeholder for the probe of the last computed step.
    """
    assert region.probed_at is not None
    now = head.take(region.probed_at)
    start = head.take(region.probed_since) if region.probed_since is not None else None
    graph, call = head.graph, head.graph.call_function
    fake = probe_example(region)
    before = _placeholder(graph, "probe_before", fake)
    # The probe is cached and outlives the call, so it must not be an alias of anything.
    probe = call(torch.sub, (now, start)) if start is not None else graph.call_method("clone", (now,))
    probe.meta = {"example_value": fake}
    new, old = (graph.call_method("to", (node, torch.float32)) for node in (probe, before))
    dims = () if region.sample_dim is None else (tuple(d for d in range(fake.dim()) if d != region.sample_dim),)
    total = "sum" if region.groups else "mean"
    distance = graph.call_method(total, (graph.call_method("abs", (call(torch.sub, (new, old)),)), *dims))
    size = graph.call_method(total, (graph.call_method("abs", (old,)), *dims))
    _tag_from(probe)
    return (distance, size), probe, before


def append_diff(head: Extract, region: Region, distance: fx.Node, size: fx.Node) -> fx.Node:
    """Appends the residual diff, distance / size.

    With `region.sample_dim`, it is the largest diff of a sample of the batch, and NaN if any of them is.
    """
    ratio = head.graph.call_function(torch.div, (distance, size))
    diff = head.graph.call_method("amax", (ratio,)) if region.sample_dim is not None else ratio
    _tag_from(ratio)
    return diff


def append_exchange(
    head: Extract,
    region: Region,
    device: torch.device,
    distance_and_size: Sequence[fx.Node],
    timestep: Sequence[fx.Node],
    checksums: Sequence[fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """Appends the exchange with the other ranks of `region.groups`.

    Returns:
        What `exchange` returns, and the placeholder for the fingerprint.
    """
    with torch.no_grad():
        example = torch.empty(NUM_STATE + len(checksums), device=device)
    fingerprint = _placeholder(head.graph, "fingerprint", example)
    groups = tuple((group.name, len(group.ranks)) for group in region.groups)
    arguments = (fingerprint, tuple(timestep), tuple(checksums), tuple(distance_and_size), groups)
    exchanged = head.graph.call_function(exchange, arguments)
    _tag_from(exchanged)
    return exchanged, fingerprint


def append_timestep(head: Extract, timestep: fx.Node, device: torch.device) -> fx.Node:
    """Appends the timestep as a float32 number on `device`, the device of the residual diff."""
    taken = head.take(timestep)
    largest = head.graph.call_method("amax", (taken,))
    as_float = head.graph.call_method("to", (largest, device, torch.float32))
    _tag_from(largest)
    return as_float


def append_checksums(head: Extract, conditioning: fx.Node, device: torch.device) -> list[fx.Node]:
    """Appends two float32 sums over the values of the conditioning, the second one weighted by position.

    They show that the conditioning was written in place, which does not change the version of an inference tensor.
    """
    graph = head.graph
    flat = graph.call_method("reshape", (head.take(conditioning), -1))
    values = graph.call_method("to", (flat, torch.float32))
    weighted = graph.call_method("mean", (graph.call_method("cumsum", (values, 0)),))
    sums = [graph.call_method("to", (s, device)) for s in (graph.call_method("mean", (values,)), weighted)]
    _tag_from(flat)
    return sums


def _placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """Adds a placeholder after the others."""
    last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), graph._root)
    with graph.inserting_after(last):
        placeholder = graph.placeholder(name)
    placeholder.meta = {"example_value": example}
    return placeholder


def _tag_from(first: fx.Node) -> None:
    """Marks all nodes from `first` on as added by this package."""
    for node in itertools.dropwhile(lambda node: node is not first, first.graph.nodes):
        node.meta["cachedit_probe"] = True
