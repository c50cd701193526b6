"""Writes an explanation as a page of text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from textwrap import shorten

from cachedit_fx.frontend.torch_internals import recompile_limit
from cachedit_fx.inspect.explanation.data import (
    BlockReport,
    Captured,
    GraphReport,
    ListReport,
    RegionReport,
    Value,
    Verdict,
)
from cachedit_fx.inspect.explanation.explanation_data import Explained
from cachedit_fx.inspect.explanation.units import flops, size

_SHOWN_VERDICTS = 3
_SHOWN_RISKS = 8
_PARTS = {"Fn": "Fn, always runs", "region": "region", "Bn": "Bn, always runs", "between": "always runs", "": "runs"}


def page(explanation: Explained) -> str:
    """Returns the whole page, without a trailing newline."""
    lines = [f"cachedit_fx.explain: {explanation.title}"]
    for captured in explanation.modules:
        lines.append("")
        graphs = [(i, g) for i, g in enumerate(explanation.graphs) if g.module == captured.module]
        lines += _module(captured, [g for _, g in graphs])
        for i, graph in graphs:
            lines += ["", *_graph(i, graph)] if graph.is_cached or len(graphs) == 1 else _short(i, graph)
        if len(graphs) > 1 and not any(graph.is_cached for _, graph in graphs):
            i, graph = max(graphs, key=lambda pair: pair[1].num_nodes)
            lines += ["", "the largest of them:", *_graph(i, graph)]
    lines += [f"\nNote: {note}" for note in explanation.notes]
    lines += ["", "Graphs: .graph('before' | 'after' | 'head' | 'compute' | 'reuse' | 'tail'), .diff(), .to_html(path)"]
    return "\n".join(lines)


def _module(captured: Captured, graphs: list[GraphReport]) -> Iterator[str]:
    name = f"{captured.module}: {captured.cls}" if captured.module else captured.cls
    count = f"{len(graphs)} graph{'s' * (len(graphs) != 1)}"
    cached = sum(graph.is_cached for graph in graphs)
    yield f"{name}: captured {captured.how}, {count}, {cached or 'none'} cached"
    if captured.why:
        yield f"  why in parts: {captured.why}"
        if captured.line:
            yield f"                {captured.line}"
    if captured.reason and (captured.why or not graphs):  # Otherwise the graph shows what does not fit.
        yield f"  not cached:   {captured.reason}"
        yield f"  what to do:   {captured.cure}"
    changed = ", ".join(f"{field}={value!r}" for field, value in captured.config.items())
    yield f"  configuration: {changed or 'the defaults'}"


def _short(number: int, graph: GraphReport) -> Iterator[str]:
    """Yields the line of one of several graphs of a transformer that is captured in parts."""
    ends = ""
    if graph.break_after is not None:
        place = f" at {graph.break_after.where}" if graph.break_after.where else ""
        ends = f"; ends{place}: {shorten(graph.break_after.reason, 100)}"
    yield f"graph {number}: runs without caching; {graph.num_nodes} nodes, {flops(graph.cost.flops)}{ends}"


def _graph(number: int, graph: GraphReport) -> Iterator[str]:
    verdict = "cached" if graph.is_cached else "runs without caching"
    total = f"{graph.num_nodes} nodes, {flops(graph.cost.flops)}, {size(graph.cost.weight_bytes)} of weights"
    yield f"graph {number}: {verdict}; {total}{' (estimated)' if graph.is_estimated else ''}"
    for blocks in graph.lists:
        if blocks.in_chain:
            yield from (f"  {line}" for line in _list(blocks))
    others = [f"{blocks.path} ({blocks.num_blocks})" for blocks in graph.lists if not blocks.in_chain]
    if others:
        yield f"  block lists outside of the chain: {', '.join(others)}"
    if graph.blocks:
        yield "  chain:"
        yield from (f"    {line}" for line in chain_lines(graph))
    yield from (f"  {line}" for line in _verdicts(number, graph))
    for region in graph.regions:
        yield from (f"  {line}" for line in _region(region))
    if graph.is_cached:
        yield f"  pieces to compile: {len(graph.pieces)}"
        yield from (f"    {line}" for line in _pieces(graph))
        ends = graph.timestep or "none (reuses only inside session(key))", graph.conditioning or "none"
        yield f"  inputs that identify a session: timestep {ends[0]}, conditioning {ends[1]}"
        yield f"  a reused step saves {graph.saved_flops:.1%} of the FLOPs; a session caches {size(graph.state_bytes)}"
    if graph.break_after is not None:
        place = f" at {graph.break_after.where}" if graph.break_after.where else ""
        yield f"  ends{place}: {shorten(graph.break_after.reason, 160)}"
        if graph.break_after.line:
            yield f"    {graph.break_after.line}"
    yield from (f"  {line}" for line in _risks(graph))


def _list(blocks: ListReport) -> Iterator[str]:
    names = " and ".join((blocks.path, *blocks.alternates))
    yield f"{names}: {blocks.num_blocks} blocks, {blocks.pattern or 'no template fits'}"
    for stream in blocks.streams:
        named = f" (`{stream.label}` in the code)" if stream.label != stream.role else ""
        yield f"  stream {stream.role or stream.name}{named}: {_value(stream)}"
    if blocks.invariants:
        shown = ", ".join(f"{value.label} {value}" for value in blocks.invariants)
        yield f"  every block reads: {shown}"
    if blocks.loss:
        yield f"  the streams end: {blocks.loss}"


def _value(value: Value) -> str:
    return f"{value}, {size(value.nbytes)}"


def chain_lines(graph: GraphReport) -> list[str]:
    """Returns the chain, with one line for each run of equal blocks, and one for the place at which it breaks."""
    lines = []
    broken = graph.broken_at
    for _, run in itertools.groupby(graph.blocks, key=lambda block: (_kind(block), broken and block.number >= broken)):
        blocks = list(run)
        if blocks[0].number == broken:
            lines.append(f"✗ {graph.broken}")
        lines.append(_run_line(blocks))
    if broken == len(graph.blocks):
        lines.append(f"✗ {graph.broken}")
    return lines


def _kind(block: BlockReport) -> tuple[object, ...]:
    return (block.path.rpartition(".")[0], block.part, block.region, block.piece, block.cls, block.num_nodes)


def _run_line(run: list[BlockReport]) -> str:
    first, last = run[0], run[-1]
    path, _, number = first.path.rpartition(".")
    name = first.path if len(run) == 1 else f"{path}.{number}-{last.path.rpartition('.')[2]}"
    part = _PARTS[first.part] if first.region is None else f"region {first.region}"
    piece = f", piece {first.piece}" if first.piece is not None else ""
    each = " each" if len(run) > 1 else ""
    cost = f"{first.num_nodes} nodes, {flops(first.cost.flops)}, {size(first.cost.weight_bytes)} of weights{each}"
    return f"{name:<34} {first.cls}: {cost} [{part}{piece}]"


def _verdicts(number: int, graph: GraphReport) -> Iterator[str]:
    """Yields the nearest verdicts, and all those of templates that a user registered."""
    if graph.is_cached and graph.verdicts:
        yield "registered templates that were tried first and do not fit:"
    shown = [
        verdict
        for i, verdict in enumerate(graph.verdicts)
        if i < _SHOWN_VERDICTS or graph.is_cached or verdict.is_registered
    ]
    for verdict in shown:
        yield from _verdict(verdict)
    if len(graph.verdicts) > len(shown):
        yield f"and {len(graph.verdicts) - len(shown)} more in .graphs[{number}].verdicts"


def _verdict(verdict: Verdict) -> Iterator[str]:
    fitted = f", {verdict.fitted} of {verdict.total} blocks fit" if verdict.total else ""
    yield f"{verdict.template or 'not cached'}{fitted}: {verdict.cause}"
    yield f"  expected: {verdict.expected}"
    yield f"  found:    {verdict.found}"
    place = [verdict.place, f"node `{verdict.node}`" if verdict.node else ""]
    if any(place) or verdict.where:
        yield f"  at:       {', '.join(filter(None, (*place, verdict.where)))}"
    if verdict.line:
        yield f"            {verdict.line}"
    yield f"  do:       {verdict.cure}"


def _region(region: RegionReport) -> Iterator[str]:
    yield f"region {region.name}: a reused step saves {flops(region.cost.flops)}"
    reuses = "" if region.decided_by != "diff" else f"; reuses below {region.threshold}"
    yield f"  probe: {region.probe}{reuses}"
    if region.guidance:
        yield f"  guidance: {region.guidance}"
    for cached in region.cached:
        how = f"residual against {cached.since}" if cached.cached_as == "residual" else "value"
        more = " (joined)" * cached.is_joined + " (sizes checked at every step)" * cached.is_measured
        yield f"  caches {cached.value.role or cached.value.label}: {how}{more}, {_value(cached.value)}"


def _pieces(graph: GraphReport) -> Iterator[str]:
    names = {block.number: block.path for block in graph.blocks}
    for piece in graph.pieces:
        shared = [names[number] for number in piece.blocks]
        what = f"{len(shared)} block{'s' * (len(shared) != 1)} ({shared[0]} ...)" if shared else "around the blocks"
        where = ", ".join(piece.segments)
        yield f"{piece.number}: {what} in {where}; {piece.num_nodes} nodes, {flops(piece.cost.flops)}"


def _risks(graph: GraphReport) -> Iterator[str]:
    if not graph.risks:
        return
    limit = recompile_limit()
    yield f"a change of one of these arguments triggers a recompilation (recompile_limit: {limit}):"
    by_consequence: dict[str, list[str]] = {}
    for risk in graph.risks:
        by_consequence.setdefault(risk.consequence, []).append(f"{risk.what} = {risk.found}")
    for consequence, found in by_consequence.items():
        yield f"  {consequence}:"
        more = f" and {len(found) - _SHOWN_RISKS} more" if len(found) > _SHOWN_RISKS else ""
        yield f"    {', '.join(found[:_SHOWN_RISKS])}{more}"
