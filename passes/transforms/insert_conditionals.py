"""Replaces every region by a conditional, which runs the region or reuses what it added at an earlier step.

    x -> blocks -> y      ->      head(x, before)                     computes the probe vector
                                  pred = step.decide(0, probe_vector)
                                  compute_or_reuse(pred, compute, reuse, (...))
                                  step.update(0, residual, ...)
                                  tail(...)

`step` is the first placeholder: the state of the call (see `Step`). All other values are tensors and numbers.
"""

from __future__ import annotations

import bisect
import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.passes.analysis.cached_examples import cached_example
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.extract import Extract, extract, free_sizes, graph_module, outputs_of
from cachedit_fx.passes.graph_pass import GraphPass
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import LiveOut, Region
from cachedit_fx.passes.transforms.append_probe import (
    append_checksums,
    append_diff,
    append_distance,
    append_exchange,
    append_timestep,
)
from cachedit_fx.patterns.nodes import size_key, value_of


class Step(Protocol):
    """What a cached graph calls during one step. `region` counts from 0."""

    def before(self, region: int) -> torch.Tensor:
        """The probe of the last computed step; any tensor of that shape if there is none."""

    def fingerprint(self, region: int) -> torch.Tensor:
        """What the decision depends on besides the probe vector, as float32 numbers (see `exchange`).

        Only called if the region has process groups.
        """

    def decide(self, region: int, probe_vector: torch.Tensor | None, streams: tuple[torch.Tensor, ...] = ()) -> bool:
        """Whether to compute.

        Args:
            probe_vector: [residual diff, is_equal, asks, timestep, checksums], float32. The host reads it once per
                call. A region without a probe has no residual diff, a region without process groups has no `is_equal`
                and `asks` (see `exchange`), and only the first region has the timestep and the checksums. None if
                nothing is left.
            streams: The streams at the cut whose sizes depend on data. The cached values must have their shapes.
        """

    def cached(self, region: int) -> tuple[torch.Tensor | None, ...]:
        """The cached values of the last computed step, one per live-out; None for each that is missing."""

    def residual(self, region: int, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
        """The residual of a stream whose sizes depend on data; None if the stream did not keep its shape.

        At a reused step, `after` is the cached value and is returned.
        """

    def observe(self, region: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Receives the live-outs of a region, if the graph was built with `config.shadow`."""

    def update(self, region: int, probe: torch.Tensor | None, cached: tuple[torch.Tensor | None, ...]) -> None:
        """Receives the probe (None if there is none) and the values to cache.

        Called at every step. A reused step passes the values that it was given.
        """


def compute_or_reuse(
    pred: bool, compute: Callable[..., Any], reuse: Callable[..., Any], operands: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Runs `compute` if `pred`, else `reuse`. Like `torch.cond(pred, compute, reuse, operands)`, but on the host."""
    result: tuple[Any, ...] = (compute if pred else reuse)(*operands)
    return result


class InsertConditionals(GraphPass):
    """Builds the cached graph.

    It takes `step` and then the placeholders of the original graph, and returns what the original graph returned. Its
    submodules are head, compute_i, reuse_i, (between_i) and tail. Unless `context.exact`, live-outs are made
    contiguous if the branches would return them with different strides, because a compiled tail takes one layout. This
    changes rounding if a kernel depends on strides.
    """

    name = "insert-conditionals"

    def requires(self, graph_module: fx.GraphModule) -> None:
        plan = self.context.plan
        assert plan is not None and self.context.runtime_plan is not None, "there is no plan"
        assert plan.gm is graph_module, "the plan is that of another graph"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        plan, runtime_plan = self.context.plan, self.context.runtime_plan
        assert plan is not None and runtime_plan is not None
        checksummed = plan.conditioning if runtime_plan.num_checksums else None
        same_strides, observed = not self.context.exact, self.context.config.shadow
        return PassResult(_Builder(plan, checksummed, same_strides, observed).build(), True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        plan = self.context.plan
        assert plan is not None
        conditionals = graph_module.graph.find_nodes(op="call_function", target=compute_or_reuse)
        num_conditionals, num_regions = len(conditionals), len(plan.regions)
        assert num_conditionals == num_regions, f"{num_conditionals} conditionals for {num_regions} regions"
        inputs, given = (
            [n.target for n in g.find_nodes(op="placeholder")] for g in (graph_module.graph, plan.gm.graph)
        )
        assert inputs == ["step", *given], f"the inputs are {inputs}"


class _Builder:
    """Builds the outer graph, segment after segment."""

    def __init__(self, plan: Plan, checksummed: fx.Node | None, same_strides: bool, observed: bool) -> None:
        self.source, self.program, self.regions, self.timestep = plan.gm, plan.program, plan.regions, plan.timestep
        self.checksummed, self.same_strides, self.observed = checksummed, same_strides, observed
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}
        self.sizes = free_sizes(self.source.graph)

    def build(self) -> fx.GraphModule:
        self.step = self.graph.placeholder("step")
        for node in self.program.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.node_copy(node)
        segments = _segments(self.program, self.regions)
        for number, region in enumerate(self.regions):
            self._conditional(number, region, *self._head(segments[number], number, region))
        self._call(extract(segments[-1], self.sizes), outputs_of(segments[-1]), "tail", [])
        output = self.program.nodes[-1]
        self.graph.output(fx.map_arg(output.args[0], lambda node: self._value(node)))
        return graph_module(self.root, self.graph, "Cached")

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.values:  # An attribute of the model that the graph returns.
            setattr(self.root, str(node.target), getattr(self.source, str(node.target)))
            self.values[node] = self.graph.node_copy(node)
        return self.values[node]

    def _head(self, nodes: list[fx.Node], number: int, region: Region) -> tuple[fx.Node | None, fx.Node | None]:
        """Adds the segment before the region, with the probe. Returns the probe vector and the probe."""
        head = extract(nodes, self.sizes)
        parts, probe = self._parts(head, number, region)
        extra = [probe] if probe is not None else []
        if parts:
            join = torch.cat if region.groups else torch.stack
            probe_vector = head.graph.call_function(join, (parts,))
            probe_vector.meta["cachedit_probe"] = True
            extra.insert(0, probe_vector)
        name = "head" if number == 0 else f"between_{number - 1}"
        if not nodes and not parts:
            return None, None
        called = self._call(head, outputs_of(nodes), name, extra)
        return called[0] if parts else None, called[-1] if probe is not None else None

    def _parts(self, head: Extract, number: int, region: Region) -> tuple[list[fx.Node], fx.Node | None]:
        """Appends the parts of the probe vector to a head. Returns them and the probe."""
        device = value_of(region.live_outs[0].after).device
        parts, probe = list[fx.Node](), None
        distance_and_size: tuple[fx.Node, ...] = ()
        if region.probed_at is not None:
            distance_and_size, probe, before_in = append_distance(head, region)
            self._supply(head, before_in, "before", number)
            if not region.groups:
                parts.append(append_diff(head, region, *distance_and_size))
        is_first = number == 0
        timestep = [append_timestep(head, self.timestep, device)] if is_first and self.timestep is not None else []
        source = self.checksummed if is_first else None
        checksums = append_checksums(head, source, device) if source is not None else []
        parts += [*timestep, *checksums]
        if region.groups:
            exchanged, fingerprint_in = append_exchange(head, region, device, distance_and_size, timestep, checksums)
            self._supply(head, fingerprint_in, "fingerprint", number)
            parts = [exchanged, *(head.graph.call_method("reshape", (part, 1)) for part in parts)]
        return parts, probe

    def _supply(self, head: Extract, placeholder: fx.Node, method: str, number: int) -> None:
        """Makes `step.method(number)` the value of a placeholder that was added to a head."""
        head.inputs.append(placeholder)
        self.values[placeholder] = self.graph.call_method(method, (self.step, number))

    def _conditional(self, number: int, region: Region, probe_vector: fx.Node | None, probe: fx.Node | None) -> None:
        compute, reuse, operands = _branches(self.source, region, self.sizes, self.same_strides)
        measured = tuple(self._value(pair.before) for pair in region.live_outs if pair.before and pair.is_measured)
        pred = self.graph.call_method("decide", (self.step, number, probe_vector, *((measured,) if measured else ())))
        cached = self.graph.call_method("cached", (self.step, number))
        held = [self.graph.call_function(operator.getitem, (cached, i)) for i in range(len(region.live_outs))]
        self.root.add_module(f"compute_{number}", compute)
        self.root.add_module(f"reuse_{number}", reuse)
        branches = (self.graph.get_attr(f"compute_{number}"), self.graph.get_attr(f"reuse_{number}"))
        arguments = (pred, *branches, (*(self._value(node) for node in operands), *held))
        result = self.graph.create_node("call_function", compute_or_reuse, arguments, name="conditional")
        count = len(region.live_outs)
        out = [self.graph.call_function(operator.getitem, (result, i)) for i in range(2 * count)]
        for pair, node in zip(region.live_outs, out, strict=False):
            node.meta = copy.copy(pair.after.meta)
            self.values[pair.after] = node
        if self.observed:
            self.graph.call_method("observe", (self.step, number, tuple(out[:count])))
        to_cache = out[count:]
        for i, pair in enumerate(region.live_outs):
            if pair.before and pair.is_measured:
                to_cache[i] = self.graph.call_method(
                    "residual", (self.step, number, to_cache[i], self._value(pair.before))
                )
        self.graph.call_method("update", (self.step, number, probe, tuple(to_cache)))

    def _call(self, piece: Extract, outputs: Sequence[fx.Node], name: str, extra: list[fx.Node]) -> list[fx.Node]:
        """Adds a call of the submodule `name`. Returns its outputs that stand for `extra`."""
        module = piece.finish(self.source, [*(piece.copies[node] for node in outputs), *extra], name.title())
        self.root.add_module(name, module)
        call = self.graph.call_module(name, tuple(self._value(node) for node in piece.inputs))
        items = [self.graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs) + len(extra))]
        for node, item in zip(outputs, items, strict=False):
            item.meta = copy.copy(node.meta)
            self.values[node] = item
        return items[len(outputs) :]


def _segments(program: Program, regions: tuple[Region, ...]) -> list[list[fx.Node]]:
    """The nodes before, between and after the regions; hoisted nodes are before the region that they were in."""
    inside = {node: i for i, region in enumerate(regions) for node in (*region.deferred, *region.nodes)}
    hoisted = {node: i for i, region in enumerate(regions) for node in region.hoisted}
    starts = sorted(program.position[region.nodes[0]] for region in regions)
    segments: list[list[fx.Node]] = [[] for _ in range(len(regions) + 1)]
    for position, node in enumerate(program.nodes):
        if node in inside or node.op in ("placeholder", "get_attr", "output"):
            continue
        number = hoisted[node] if node in hoisted else bisect.bisect_right(starts, position)
        segments[number].append(node)
    return segments


def _branches(
    source: fx.GraphModule, region: Region, sizes: Sequence[fx.Node], same_strides: bool
) -> tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]]:
    """`compute`, `reuse` and their operands.

    Both take the operands and then the cached values, and return the live-outs and then the values to cache.
    """
    body = extract((*region.deferred, *region.nodes), sizes)
    starts = [_start(body, pair) for pair in region.live_outs]
    operands = list(body.inputs)
    outputs = [body.copies[pair.after] for pair in region.live_outs]
    to_cache = []
    for pair, start, out in zip(region.live_outs, starts, outputs, strict=True):
        if pair.is_measured:
            to_cache.append(out)  # Its residual is computed after the conditional, where the sizes are known.
            continue
        # A cached value must not alias an output, because it outlives the call.
        node = (
            body.graph.call_function(torch.sub, (out, start))
            if start is not None
            else body.graph.call_method("clone", (out,))
        )
        node.meta["cachedit_probe"] = True
        to_cache.append(node)
    uneven = {pair for pair in region.live_outs if same_strides and _differs_in_strides(pair)}
    outputs = [_contiguous(out) if p in uneven else out for p, out in zip(region.live_outs, outputs, strict=True)]
    _placeholders(body.graph, [f"cached_{i}" for i in range(len(region.live_outs))])
    compute = body.finish(source, [*outputs, *to_cache], "Compute")
    reuse = _reuse(source, region.live_outs, operands, uneven)
    for pair in uneven:  # The readers after the region are compiled for the layout that both branches return.
        with torch.no_grad():
            pair.after.meta["example_value"] = value_of(pair.after).contiguous()
    return compute, reuse, operands


def _start(piece: Extract, pair: LiveOut) -> fx.Node | None:
    """The stream in `piece` that is subtracted to get the residual of `pair`; None if the value itself is cached."""
    if pair.before is None:
        return None
    return piece.take(pair.before) if pair.joins is None else pair.joins.into(piece.graph, piece.take)


def _differs_in_strides(pair: LiveOut) -> bool:
    with torch.no_grad():
        held = cached_example(pair)
        reused = torch.add(value_of(pair.before), held) if pair.before is not None else held
    return [size_key(s) for s in reused.stride()] != [size_key(s) for s in value_of(pair.after).stride()]


def _contiguous(node: fx.Node) -> fx.Node:
    copied = node.graph.call_method("contiguous", (node,))
    copied.meta["cachedit_probe"] = True
    return copied


def _reuse(
    source: fx.GraphModule, live_outs: tuple[LiveOut, ...], operands: list[fx.Node], uneven: set[LiveOut]
) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = {node: graph.placeholder(node.name) for node in operands}
    for node, placeholder in inputs.items():
        placeholder.meta = copy.copy(node.meta)
    piece = Extract(graph, list(operands), dict(inputs))
    cached = [graph.placeholder(f"cached_{i}") for i in range(len(live_outs))]
    outputs = []
    for pair, held in zip(live_outs, cached, strict=True):
        held.meta = {"example_value": cached_example(pair)}
        start = _start(piece, pair)
        out = (
            graph.call_function(torch.add, (start, held)) if start is not None else graph.call_method("clone", (held,))
        )
        outputs.append(_contiguous(out) if pair in uneven else out)
    graph.output((*outputs, *cached))
    return graph_module(source, graph, "Reuse")


def _placeholders(graph: fx.Graph, names: list[str]) -> None:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
