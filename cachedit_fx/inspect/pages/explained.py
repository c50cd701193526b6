"""Writes the HTML page of an `Explanation`, and its display in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.reference import POLICY, meaning
from cachedit_fx.frontend.torch_internals import recompile_limit
from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport, RegionReport, Verdict
from cachedit_fx.inspect.explanation.units import flops, size
from cachedit_fx.inspect.pages.chain import chain_svg, path_of, reuses_when
from cachedit_fx.inspect.pages.layout import spans_of
from cachedit_fx.inspect.pages.pieces import Kind, kinds_of
from cachedit_fx.inspect.pages.render import as_json, asset, render
from cachedit_fx.inspect.pages.side_by_side import Chunk, chunks_of
from cachedit_fx.patterns.cause import Cause

if TYPE_CHECKING:
    from cachedit_fx.inspect.explanation.data import Captured
    from cachedit_fx.inspect.explanation.explanation_data import Explained

_PARTS = {
    "Fn": "Fn: always runs; the probe is usually the residual over these blocks",
    "Bn": "Bn: always runs",
    "between": "always runs, between two regions",
    "": "runs; the graph is not cached",
}


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the FLOPs of a graph.

    Attributes:
        name: The name of the part.
        flops: The FLOPs of the part.
        percent: The percentage of the FLOPs of the graph, from 0 to 100, to one decimal place. The percentages of a
            graph sum to 100.
        is_skipped: Whether a reused step skips the part.
    """

    name: str
    flops: int
    percent: float
    is_skipped: bool


@dataclass(frozen=True, slots=True)
class StackView:
    """Equal blocks that the drawing of the chain shows as one.

    Attributes:
        key: The end of the id of the element that shows them one by one.
        path: Their path, such as `blocks.1–18`.
        blocks: The blocks.
        kind: Their kind.
    """

    key: str
    path: str
    blocks: tuple[BlockReport, ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class GraphView:
    """The data of a graph for the HTML template.

    Attributes:
        key: The prefix of the ids of its blocks.
        report: The report of the graph.
        is_main: Whether it is shown expanded.
        chain: The drawing of the chain as SVG; empty if there are no blocks.
        stacks: The blocks that the drawing shows as one.
        kinds: The kinds of blocks.
        shares: The parts of the FLOPs.
        chunks: The rows of the graph before and after the rewrite.
        names: The paths of the blocks, by their numbers.
    """

    key: str
    report: GraphReport
    is_main: bool
    chain: str
    stacks: list[StackView]
    kinds: list[Kind]
    shares: list[Share]
    chunks: list[Chunk]
    names: dict[int, str]

    def reuses_when(self, region: RegionReport) -> str:
        """Returns the condition under which a step is reused, in a few words."""
        return reuses_when(region)

    @property
    def streams(self) -> list[str]:
        """The names of the streams of the chain: the first one is drawn solid, the others dashed."""
        chain = [one for one in self.report.lists if one.in_chain and one.boundaries]
        return list(dict.fromkeys(role for one in chain for role in one.boundaries[0]))

    @property
    def headline(self) -> str:
        """One sentence that states whether the graph is cached."""
        report = self.report
        if report.is_cached:
            saves = f"a reused step skips {report.saved_flops:.1%} of the FLOPs"
            return f"Cached: {saves}, and a session caches {size(report.state_bytes)}."
        return f"Runs without caching: {_why_not(report)}."


@dataclass(frozen=True, slots=True)
class ModuleView:
    """The data of a transformer and its graphs for the HTML template."""

    captured: Captured
    graphs: list[GraphView]


def explanation_page(explanation: Explained) -> str:
    """Returns the page as HTML that loads nothing from the network.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    modules = list(_modules(explanation))
    views = [view for module in modules for view in module.graphs]
    data = {f"{view.key}-{block.number}": _block(block) for view in views for block in view.report.blocks}
    return render(
        "explanation.html.j2",
        title=f"explain: {explanation.title}",
        explanation=explanation,
        verdict=verdict_line(explanation),
        modules=modules,
        meanings={name: meaning(declared) for name, declared in OPTIONS.items()} | {"policy": POLICY},
        limit=recompile_limit(),
        data=as_json(data),
    )


def explanation_fragment(explanation: Explained) -> str:
    """Returns HTML for a notebook: the chain of the main graph and a small table, without scripts and jinja2."""
    mark = "✓" if explanation.is_cached else "✗"
    head = f"<strong>{escape(explanation.title)}</strong> {mark} {escape(verdict_line(explanation))}"
    parts = [f"<style>{asset('chain.css')}</style>", f"<div>{head}</div>"]
    if explanation.graphs:
        graph = explanation.graphs[explanation.index()]
        if graph.blocks:
            parts.append(f'<div style="overflow-x:auto">{chain_svg(graph, "nb", opens=False)}</div>')
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in _facts(graph)
        )
        parts.append(f"<table>{rows}</table>")
    return f'<div class="cachedit-fx">{"".join(parts)}</div>'


def verdict_line(explanation: Explained) -> str:
    """Returns one sentence that states whether the model is cached."""
    graphs = explanation.graphs
    cached = [graph for graph in graphs if graph.is_cached]
    if explanation.is_cached and len(cached) == 1:
        saved, state = cached[0].saved_flops, size(cached[0].state_bytes)
        return f"Cached: a reused step skips {saved:.1%} of the FLOPs, and a session caches {state}."
    if cached:
        how = "Cached" if explanation.is_cached else "Partly cached"
        named = ", ".join(f"{graph.module or graph.cls} {graph.saved_flops:.1%}" for graph in cached)
        count = f"{len(cached)} of {len(graphs)} graphs"
        return f"{how}: {count} have a conditional; the share of the FLOPs that a reused step skips is {named}."
    if not graphs:
        return f"Not cached: {'; '.join(captured.reason for captured in explanation.modules)}."
    reason = _why_not(graphs[explanation.index()])
    if len(graphs) > len(explanation.modules) and any(captured.why for captured in explanation.modules):
        return f"Not cached: Dynamo captures it only in {len(graphs)} graphs; for the largest, {reason}."
    return f"Not cached: {reason}."


def _why_not(graph: GraphReport) -> str:
    if not graph.verdicts:
        return "no chain of blocks was found"
    nearest = graph.verdicts[0]
    if nearest.cause == Cause.NO_TRANSFORMER.value:
        return f"the model has no chain of equal transformer blocks ({nearest.found})"
    fitted = f", {nearest.fitted} of {nearest.total} blocks fit" if nearest.total else ""
    difference = f"expected: {nearest.expected}; found: {nearest.found}"
    if not nearest.template:
        return difference
    if nearest.total and nearest.fitted == nearest.total:
        return f"{nearest.template} fits, but the graph cannot be cut; {difference}"
    if graph.broken_at is not None and nearest.place:
        where = nearest.place if nearest.following else f"in {nearest.place}"
        return f"the stream {nearest.stream} ends {where} ({nearest.where_short or nearest.found})"
    return f"no template fits; the nearest is {nearest.template}{fitted}"


def _modules(explanation: Explained) -> Iterator[ModuleView]:
    for captured in explanation.modules:
        of_module = [(i, report) for i, report in enumerate(explanation.graphs) if report.module == captured.module]
        main = max((report.num_nodes for _, report in of_module), default=0)
        is_cached = any(report.is_cached for _, report in of_module)
        yield ModuleView(
            captured,
            [
                _view(
                    f"g{number}",
                    report,
                    explanation.graph_modules[number],
                    is_main=report.is_cached if is_cached else report.num_nodes == main,
                )
                for number, report in of_module
            ],
        )


def _view(key: str, report: GraphReport, graphs: Mapping[str, Any], *, is_main: bool) -> GraphView:
    return GraphView(
        key=key,
        report=report,
        is_main=is_main,
        chain=chain_svg(report, key) if report.blocks else "",
        stacks=_stacks(report),
        kinds=kinds_of(report.blocks)[0],
        shares=_shares(report),
        chunks=chunks_of(report, graphs) if "before" in graphs else [],
        names={block.number: block.path for block in report.blocks},
    )


def _stacks(graph: GraphReport) -> list[StackView]:
    kinds, kind_of = kinds_of(graph.blocks)
    found = []
    for number, (first, last) in enumerate(spans_of(graph)):
        if last - first > 1:
            blocks = graph.blocks[first:last]
            found.append(StackView(f"stack-{number}", path_of(blocks), blocks, kinds[kind_of[first]]))
    return found


def _shares(graph: GraphReport) -> list[Share]:
    total = sum(part.flops for part in graph.parts)
    if not total:
        return []
    skipped = round(1000 * sum(part.flops for part in graph.parts if part.is_skipped) / total)
    percents: dict[str, float] = {}
    for is_skipped, units in ((True, skipped), (False, 1000 - skipped)):
        parts = [part for part in graph.parts if part.is_skipped is is_skipped]
        shared = apportion([part.flops for part in parts], units)
        percents |= {part.name: share / 10 for part, share in zip(parts, shared, strict=True)}
    return [Share(part.name, part.flops, percents[part.name], part.is_skipped) for part in graph.parts]


def apportion(counts: Sequence[int], units: int) -> list[int]:
    """Returns how many of `units` each count gets, so that they sum to `units`: the method of the largest remainder."""
    total = sum(counts)
    if not total:
        return [0] * len(counts)
    exact = [units * count / total for count in counts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: units - sum(shares)]:
        shares[i] += 1
    return shares


def _block(block: BlockReport) -> dict[str, Any]:
    """Returns what the panel shows about a block."""
    part = _PARTS.get(block.part, f"region {block.region}: runs or is skipped")
    facts = [
        ("Path", block.path),
        ("Class", block.cls or "not recorded by Dynamo"),
        ("Part", part),
        ("Piece", "" if block.piece is None else f"{block.piece}, shared by all blocks of equal structure"),
        ("Nodes", str(block.num_nodes)),
        ("FLOPs", flops(block.cost.flops)),
        ("Bytes moved", size(block.cost.moved_bytes)),
        ("Weights", size(block.cost.weight_bytes)),
        ("Source", block.where),
        ("Reads", ", ".join(block.reads)),
        ("Returns", ", ".join(block.makes)),
    ]
    shown = [fact for fact in facts if fact[1]]
    return {"title": f"Block {block.number}: {block.path}", "facts": shown, "code": block.code}


def _facts(graph: GraphReport) -> Iterator[tuple[str, str]]:
    yield "graph", f"{graph.num_nodes} nodes, {flops(graph.cost.flops)}, {size(graph.cost.weight_bytes)} of weights"
    for blocks in graph.lists:
        if blocks.in_chain:
            yield blocks.path, f"{blocks.num_blocks} blocks, {blocks.pattern or 'no template fits'}"
    for region in graph.regions:
        how = f"reused if {reuses_when(region)}; a session caches {size(region.state_bytes)}"
        yield f"region {region.name}", f"a reused step saves {flops(region.cost.flops)}; {how}"
    if not graph.is_cached and graph.verdicts:
        yield from _nearest(graph.verdicts[0])


def _nearest(verdict: Verdict) -> Iterator[tuple[str, str]]:
    yield "nearest miss", f"{verdict.template or 'not cached'}: {verdict.cause}"
    yield "expected", verdict.expected
    yield "found", verdict.found
    yield "at", ", ".join(filter(None, (verdict.place, verdict.where, verdict.line)))
    yield "do", verdict.cure
