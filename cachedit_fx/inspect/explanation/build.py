"""Builds the `GraphReport` of a graph from the trace of its passes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, CacheType
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.verdict import num_verdicts
from cachedit_fx.inspect.explanation.costs import CostCounter, num_bytes
from cachedit_fx.inspect.explanation.data import (
    BlockReport,
    BreakReport,
    CachedValueReport,
    Cost,
    GraphReport,
    ListReport,
    PartReport,
    PieceReport,
    RegionReport,
    RiskReport,
    Value,
    Verdict,
)
from cachedit_fx.inspect.explanation.graphs import code_of, input_names, last_frame, statements
from cachedit_fx.inspect.explanation.trace import Trace
from cachedit_fx.passes.analysis.cached_examples import cached_examples
from cachedit_fx.passes.analysis.dataflow import Program, is_weight
from cachedit_fx.passes.analysis.make_plan import group_lists, nearest_list
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.blocks import Block, BlockList
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.patterns.nodes import base_name, is_tensor, value_of
from cachedit_fx.runtime.cached_values import covered
from cachedit_fx.runtime.guidance import Unguided, why_never

_WITHOUT_PROBE = {
    "ratios": "none (magnitude_ratios decide)",
    "mask": "none (a static mask decides)",
    "decider": "none (a decider decides)",
}


def build_report(
    gm: fx.GraphModule,
    trace: Trace,
    config: CacheConfig,
    declared: Declaration,
    *,
    cls: str,
    number: int,
    risks: tuple[RiskReport, ...] = (),
    break_after: BreakReport | None = None,
) -> GraphReport:
    """Returns the report of a graph that the passes ran on.

    Args:
        gm: The graph that the passes worked on.
        trace: What the passes reported.
        config: The configuration.
        declared: What the user declared about the model.
        cls: The name of the class of the transformer.
        number: The number of the graph, from 0.
        risks: The arguments that the graph is specialized on.
        break_after: Why the graph ends before the model does; None if it does not.
    """
    program = trace.program or Program(gm.graph)
    return _Builder(gm, program, trace, config, declared).report(cls, number, risks, break_after)


class _Builder:
    """Builds the parts of one report, with a common counter of costs."""

    def __init__(
        self, gm: fx.GraphModule, program: Program, trace: Trace, config: CacheConfig, declared: Declaration
    ) -> None:
        self.program, self.trace, self.config, self.declared = program, trace, config, declared
        self.costs = CostCounter(gm)
        graph = program.nodes[0].graph
        self.inputs = input_names(graph, {node.name for node in program.nodes if node.op != "placeholder"})
        self.regions: tuple[Region, ...] = trace.plan.regions if trace.plan is not None else ()

    def report(
        self, cls: str, number: int, risks: tuple[RiskReport, ...], break_after: BreakReport | None
    ) -> GraphReport:
        plan, program = self.trace.plan, self.program
        is_cached = bool(self.trace.piece_list)
        blocks = self._blocks()
        cost = sum((block.cost for block in blocks), self._around(blocks))
        regions = tuple(map(self._region, self.regions)) if is_cached else ()
        saved = sum(region.cost.flops for region in regions)
        ends = [plan.timestep, plan.conditioning] if plan is not None else [None, None]
        return GraphReport(
            module="",
            cls=cls,
            number=number,
            is_cached=is_cached,
            num_nodes=len(program.nodes),
            arguments=tuple(value_report(node) for node in program.nodes if _is_argument(node)),
            cost=cost,
            lists=tuple(map(self._list, self.trace.found)),
            blocks=blocks,
            verdicts=tuple(map(self._verdict, self._mismatches(is_cached=is_cached))),
            regions=regions,
            parts=self._part_reports(blocks, regions) if is_cached else (),
            pieces=tuple(self._piece(i) for i in range(len(self.trace.piece_list))),
            timestep=base_name(ends[0]) if ends[0] is not None else "",
            conditioning=base_name(ends[1]) if ends[1] is not None else "",
            saved_flops=saved / cost.flops if cost.flops else 0.0,
            state_bytes=sum(region.state_bytes for region in regions),
            break_after=break_after,
            risks=risks,
            is_estimated=self.costs.is_estimated,
        )

    def _chain(self) -> Sequence[BlockList]:
        plan, trace = self.trace.plan, self.trace
        if plan is not None:
            return [match.blocks for match in plan.chain]
        if not trace.chain:
            return self._nearest_to_chain()
        return [trace.matches[b.path].blocks if b.path in trace.matches else b for b in trace.chain]

    def _nearest_to_chain(self) -> Sequence[BlockList]:
        """The list that the mismatches are about; or else the heaviest one, if it is no part of a block of another."""
        named = next((one.path for one in self.trace.mismatches if one.path), "")
        found = next((blocks for blocks in self.trace.found if blocks.path == named), None)
        found = found or nearest_list(self.program, self.trace.found)
        return () if found is None else (found,)

    def _mismatches(self, *, is_cached: bool) -> Sequence[Mismatch]:
        if not is_cached:
            return self.trace.mismatches
        assert self.trace.plan is not None
        return [one for match in self.trace.plan.chain for one in match.passed_over.values()]

    def _blocks(self) -> tuple[BlockReport, ...]:
        lines = statements(self.program.nodes[0].graph)
        parts = self._parts()
        # A block with a deferred part is in two pieces; the first one is its main piece.
        pieces = {block: i for i, piece in reversed([*enumerate(self.trace.piece_list)]) for block in piece.blocks}
        found: list[BlockReport] = []
        for blocks in self._chain():
            for i, block in enumerate(blocks.blocks):
                number = len(found)
                nodes = list(self.program.nodes[block.start : block.span_end])
                first = next((node for node in nodes if last_frame(node)), None)
                part, region = parts.get(number, ("", None))
                found.append(
                    BlockReport(
                        number=number,
                        path=block.path,
                        cls=block.cls.__name__ if block.cls is not None else "",
                        part=part,
                        region=region,
                        piece=pieces.get(number),
                        num_nodes=len(nodes),
                        cost=self.costs.of(nodes),
                        where=last_frame(first) if first is not None else "",
                        reads=self._reads(block),
                        makes=tuple(n.name for n in _boundary(blocks, i + 1).values()),
                        code=code_of(nodes, lines),
                    )
                )
        return tuple(found)

    def _reads(self, block: Block) -> tuple[str, ...]:
        read = self.program.read_from_before(block.start, block.span_end)
        return tuple(self.inputs.get(node.name, node.name) for node in read if is_tensor(node))

    def _parts(self) -> dict[int, tuple[str, int | None]]:
        """Returns the part of each block by its number, with the number of its region.

        The part is "Fn", "region" or "Bn", or "between" if the block is between two regions.
        """
        plan = self.trace.plan
        if plan is None or not self.trace.piece_list:
            return {}
        parts: dict[int, tuple[str, int | None]] = {}
        for group in group_lists(self.program, plan.chain, self.config, self.declared):
            numbers = range(group.number, group.number + len(group.blocks))
            inside_group = [(i, region) for i, region in enumerate(self.regions) if region.first in numbers]
            for number in numbers:
                inside = next((i for i, region in inside_group if region.first <= number < region.last), None)
                if inside is not None:
                    parts[number] = ("region", inside)
                elif inside_group and number < inside_group[0][1].first:
                    parts[number] = ("Fn", None)
                else:
                    parts[number] = (
                        "Bn" if not inside_group or number >= inside_group[-1][1].last else "between",
                        None,
                    )
        return parts

    def _part_reports(self, blocks: Sequence[BlockReport], regions: Sequence[RegionReport]) -> tuple[PartReport, ...]:
        """Returns the parts. The blocks of a part may lack nodes that are deferred into a region."""
        taken = {node for region in self.regions for node in (*region.deferred, *region.nodes)}
        hoisted = {node for region in self.regions for node in region.hoisted}
        nodes: dict[str, list[fx.Node]] = {name: [] for name in ("head", "Fn", "between", "Bn", "tail")}
        positions = [self.program.position[region.nodes[0]] for region in self.regions]
        part_of = {
            position: report.part
            for block, report in zip((b for one in self._chain() for b in one.blocks), blocks, strict=True)
            for position in range(block.start, block.span_end)
        }
        for position, node in enumerate(self.program.nodes):
            if node in taken:
                continue
            around = "head" if position < positions[0] else "tail" if position > positions[-1] else "between"
            name = "head" if node in hoisted else part_of.get(position, around)
            nodes[name if name in nodes else around].append(node)
        counted = {name: self.costs.of(found).flops for name, found in nodes.items()}
        skipped = [PartReport(f"region {i}", one.cost.flops, True) for i, one in enumerate(regions)]
        middle = [PartReport("between", counted["between"], False)] if len(regions) > 1 else []
        ran = {
            name: [PartReport(f"{name} blocks", counted[name], False)] if counted[name] else [] for name in ("Fn", "Bn")
        }
        head, tail = (PartReport(name, counted[name], False) for name in ("head", "tail"))
        return (head, *ran["Fn"], *skipped, *middle, *ran["Bn"], tail)

    def _around(self, blocks: Sequence[BlockReport]) -> Cost:
        """Returns the cost of the nodes that belong to no block."""
        inside = {
            position
            for blocks_of in self._chain()
            for block in blocks_of.blocks
            for position in range(block.start, block.span_end)
        }
        return self.costs.of([node for i, node in enumerate(self.program.nodes) if i not in inside])

    def _list(self, blocks: BlockList) -> ListReport:
        paths = [b.path for b in self._chain()]
        match = self.trace.matches.get(blocks.path)
        shown = match.blocks if match is not None else blocks
        in_chain = blocks.path in paths
        before = [len(b.blocks) for b in self._chain()[: paths.index(blocks.path)]] if in_chain else []
        entering = _boundary(shown, 0)
        return ListReport(
            path=blocks.path,
            alternates=blocks.alternates,
            pattern=match.label if match is not None else "",
            in_chain=in_chain,
            first=sum(before) if in_chain else None,
            num_blocks=len(blocks.blocks),
            streams=tuple(value_report(node, shown.labels.get(role, ""), role) for role, node in entering.items()),
            invariants=tuple(map(value_report, self._invariants(blocks, entering))),
            lost_at=blocks.lost_at,
            loss=blocks.loss,
            boundaries=tuple(map(tuple, shown.boundaries)),
        )

    def _invariants(self, blocks: BlockList, entering: Mapping[str, fx.Node]) -> list[fx.Node]:
        start = blocks.blocks[0].start
        read = [
            {n for n in self.program.read_from_before(block.start, block.end) if self.program.position[n] < start}
            for block in blocks.blocks
        ]
        common = set.intersection(*read) - set(entering.values())
        return [node for node in self.program.nodes[:start] if node in common and is_tensor(node)]

    def _verdict(self, mismatch: Mismatch) -> Verdict:
        node = self.program.by_name.get(mismatch.node or "")
        position = self.program.position[node] if node is not None else -1
        block, following = self._place(position, mismatch.path)
        where = mismatch.where
        return Verdict(
            template=str(mismatch.template) if mismatch.template is not None else "",
            cause=mismatch.cause.value,
            expected=mismatch.expected,
            found=mismatch.found,
            fitted=mismatch.progress,
            total=mismatch.total,
            block=block,
            node=mismatch.node or "",
            where=str(where) if where is not None else "",
            line=where.text if where is not None else "",
            cure=mismatch.cure,
            stream=mismatch.stream or "",
            lost_at=mismatch.lost_at,
            path=mismatch.path,
            following=following,
        )

    def _place(self, position: int, path: str) -> tuple[str, str]:
        """Returns the path of the block at a position, and that of the next block if the position is between them.

        A block of the list at `path` is preferred to other blocks.
        """
        lists = sorted(self.trace.found, key=lambda blocks: blocks.path != path)
        for blocks in lists:
            for block, following in itertools.zip_longest(blocks.blocks, blocks.blocks[1:]):
                if block.start <= position < block.span_end:
                    is_between = following is not None and position >= block.end
                    return block.path, following.path if is_between else ""
        return "", ""

    def _decided_by(self, region: Region) -> str:
        """As in `RegionReport`."""
        config = self.config.override(region.overrides)
        if region.probed_at is not None:
            return "diff"
        return "ratios" if config.probe == "timestep" else "mask" if config.is_static else "decider"

    def _probe(self, region: Region) -> str:
        """Returns a description of the probe. Without a probe, it begins with "none ("."""
        config = self.config.override(region.overrides)
        if region.probed_at is None:
            return _WITHOUT_PROBE[self._decided_by(region)]
        probe = region.probed_at.name
        if region.probed_since is not None:
            probe = f"{probe} - {region.probed_since.name}, the residual over the Fn blocks"
        elif config.probe == "modulated_input" and config.cache_type != CacheType.DBPrune:
            probe += ", the input of the first block after its norm and the modulation by the timestep"
        else:
            probe += ", the value before the block"
        return probe if region.sample_dim is None else f"{probe}; each sample is compared separately"

    def _region(self, region: Region) -> RegionReport:
        return RegionReport(
            name=region.name,
            first=region.first,
            last=region.last,
            decided_by=self._decided_by(region),
            probe=self._probe(region),
            cached=tuple(
                CachedValueReport(
                    value=value_report(pair.after, base_name(pair.after), pair.role),
                    cached_as="residual" if pair.before is not None else "value",
                    since=pair.before.name if pair.before is not None else "",
                    is_joined=pair.joins is not None,
                    is_measured=pair.is_measured,
                )
                for pair in region.live_outs
            ),
            state_bytes=self._state_bytes(region),
            cost=self.costs.of((*region.deferred, *region.nodes)),
            threshold=self.config.override(region.overrides).residual_diff_threshold,
            reaches_output=region.reaches_output,
            guidance=self._guidance(region),
        )

    def _why_unguided(self, region: Region) -> Unguided | None:
        roles = [pair.role for pair in region.live_outs]
        return why_never(self.config.override(region.overrides), region.name, roles, region.groups)

    def _guidance(self, region: Region) -> str:
        if self.config.override(region.overrides).guidance_reuse == "off":
            return ""
        why = self._why_unguided(region)
        if why is not None:
            return f"every branch is decided on its own, because {why.found}"
        return "where the first branch of a step computes, the others add their difference from it"

    def _state_bytes(self, region: Region) -> int:
        """Returns the bytes that a session caches for a region once the history of a forecaster is full."""
        examples, config = cached_examples(region), self.config.override(region.overrides)
        values = examples[region.probed_at is not None :]
        total = self._value_bytes(region, values, config.forecaster)
        follows = config.guidance_reuse != "off" and self._why_unguided(region) is None
        total += total if follows else 0  # A branch that follows another one caches as many differences as residuals.
        return total + sum(map(num_bytes, examples[: len(examples) - len(values)]))

    def _value_bytes(self, region: Region, values: Sequence[torch.Tensor], forecaster: Forecaster | None) -> int:
        total = sum(map(num_bytes, values))
        if forecaster is None:
            return total
        roles = tuple(pair.role for pair in region.live_outs)
        for value, is_covered in zip(values, covered(forecaster, roles), strict=True):
            if is_covered and value.is_floating_point():
                total += (forecaster.depth - 1) * num_bytes(value)
                total += num_verdicts(value) if forecaster.holds_values else 0
        return total

    def _piece(self, number: int) -> PieceReport:
        piece = self.trace.piece_list[number]
        segments = dict.fromkeys(self.trace.segments[id(segment)] for segment, _ in piece.calls)
        return PieceReport(
            number=number,
            blocks=tuple(dict.fromkeys(piece.blocks)),
            segments=tuple(segments),
            num_nodes=len(piece.gm.graph.nodes),
            cost=self.costs.of_piece(piece.gm),
        )


def _boundary(blocks: BlockList, i: int) -> Mapping[str, fx.Node]:
    return blocks.boundaries[i] if i < len(blocks.boundaries) else {}


def _is_argument(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(value_of(node), torch.Tensor) and not is_weight(node)


def value_report(node: fx.Node, label: str = "", role: str = "") -> Value:
    """Returns the report of a tensor node."""
    value = value_of(node)
    return Value(
        name=node.name,
        label=label or base_name(node),
        shape=tuple(map(str, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=num_bytes(value),
        role=role,
    )
