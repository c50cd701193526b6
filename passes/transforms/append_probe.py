"""What a head makes for the conditional to decide by: how far what is looked at moved, and the timestep."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from cachedit_fx.passes.extract import Extract
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.nodes import value_of


def append_diff(head: Extract, region: Region) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Adds the diff to the head. Returns it, what was looked at, and the placeholder for what was seen before.

    diff = mean(|now - before|) / mean(|before|), in float32 whatever the dtype: a bfloat16 mean loses the small
    differences this is for. By sample: the largest of the batch's diffs, NaN if any of them is.
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
    # What is kept outlives the call, so it may be no alias of anything.
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
    """Adds the timestep to the head, as a float32 number on the device where the diff is."""
    taken = head.take(timestep)
    largest = head.graph.call_method("amax", (taken,))
    as_float = head.graph.call_method("to", (largest, device, torch.float32))
    _tag_from(largest)
    return as_float


NUM_CHECKSUMS = 2


def append_checksums(head: Extract, conditioning: fx.Node, device: torch.device) -> list[fx.Node]:
    """Adds two float32 sums over the conditioning's values, the second one weighted by position.

    They tell where it is written in place, which an inference tensor does not count.
    """
    graph = head.graph
    flat = graph.call_method("reshape", (head.take(conditioning), -1))
    values = graph.call_method("to", (flat, torch.float32))
    weighted = graph.call_method("mean", (graph.call_method("cumsum", (values, 0)),))
    sums = [graph.call_method("to", (s, device)) for s in (graph.call_method("mean", (values,)), weighted)]
    _tag_from(flat)
    return sums


def probe_example(region: Region) -> torch.Tensor:
    """A fake of what is looked at, as it is kept."""
    assert region.probed_at is not None
    with torch.no_grad():
        now: torch.Tensor = value_of(region.probed_at)
        return now.clone() if region.probed_since is None else torch.sub(now, value_of(region.probed_since))


def _tag_from(first: fx.Node) -> None:
    """Marks everything from `first` on as ours."""
    for node in itertools.dropwhile(lambda node: node is not first, first.graph.nodes):
        node.meta["cachedit_probe"] = True
