"""Appends to a head what the probe vector consists of: the residual diff, the timestep and the checksums."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from cachedit_fx.passes.analysis.cached_examples import probe_example
from cachedit_fx.passes.extract import Extract
from cachedit_fx.passes.region import Region


def append_diff(head: Extract, region: Region) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Appends the residual diff. Returns it, the probe, and the placeholder for the probe of the last computed step.

    diff = mean(|now - before|) / mean(|before|), in float32 for every dtype, because a mean in bfloat16 loses small
    differences. With `region.sample_dim`, it is the largest diff of a sample of the batch, and NaN if any of them is.
    """
    assert region.probed_at is not None
    now = head.take(region.probed_at)
    start = head.take(region.probed_since) if region.probed_since is not None else None
    graph, call = head.graph, head.graph.call_function
    fake = probe_example(region)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        before = graph.placeholder("probe_before")
    before.meta = {"example_value": fake}
    # The probe is cached and outlives the call, so it must not be an alias of anything.
    probe = call(torch.sub, (now, start)) if start is not None else graph.call_method("clone", (now,))
    probe.meta = {"example_value": fake}
    new, old = (graph.call_method("to", (node, torch.float32)) for node in (probe, before))
    dims = () if region.sample_dim is None else (tuple(d for d in range(fake.dim()) if d != region.sample_dim),)
    distance = graph.call_method("mean", (graph.call_method("abs", (call(torch.sub, (new, old)),)), *dims))
    size = graph.call_method("mean", (graph.call_method("abs", (old,)), *dims))
    diff = call(torch.div, (distance, size))
    if dims:
        diff = graph.call_method("amax", (diff,))
    _tag_from(probe)
    return diff, probe, before


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


def _tag_from(first: fx.Node) -> None:
    """Marks all nodes from `first` on as added by this package."""
    for node in itertools.dropwhile(lambda node: node is not first, first.graph.nodes):
        node.meta["cachedit_probe"] = True
