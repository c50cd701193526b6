"""Draws the chain of a graph as SVG: blocks, streams, conditionals and reuse branches.

Equal blocks in a row are drawn as one stack. A graph that is not cached is drawn with the place of the mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport, ListReport, RegionReport
from cachedit_fx.inspect.explanation.units import flops, size
from cachedit_fx.inspect.pages.layout import BLOCK_HEIGHT, STACK, Band, Cell, Layout, lay_out
from cachedit_fx.inspect.pages.pieces import kinds_of
from cachedit_fx.inspect.pages.svg import fit, points, tag, text, title

TOP = 104.0  # Top of the blocks, below the path around a region.
TOP_PLAIN = 56.0  # Top of the blocks in a graph that is not cached.
TOP_BROKEN = 86.0  # Top of the blocks below the place at which a stream ends.
REUSE = 58.0  # Vertical position of the path around a region.
CONDITIONAL_WIDTH, CONDITIONAL_HEIGHT = 34.0, 38.0  # Half of the size of a conditional.
JOIN_WIDTH = 10.0  # Half of the width of a join.
SKIPS = 46.0  # Height of the edges that skip blocks.
BARS = 40.0  # Height of the bar of the most expensive block.
ROLES = ("hidden_states", "encoder_hidden_states")
PARTS = {
    "Fn": ("Fn", "Fn: always runs"),
    "Bn": ("Bn", "Bn: always runs"),
    "between": ("runs", "always runs"),
    "": ("", "runs"),
}


def chain_svg(graph: GraphReport, name: str, *, opens: bool = True) -> str:
    """Returns the drawing.

    Args:
        graph: The report of the graph.
        name: The prefix of the ids in the drawing, unique on a page.
        opens: Whether the blocks are buttons that open a panel, and the stacks buttons that show their blocks.
    """
    return _Drawing(graph, name, opens).svg()


_WITHOUT_PROBE = {
    "ratios": "sum of ratios allows it",
    "decider": "the decider decides",
    "mask": "the mask has a 0",
}


def reuses_when(region: RegionReport) -> str:
    """Returns the condition under which a step is reused, in a few words."""
    if region.decided_by != "diff":
        return _WITHOUT_PROBE[region.decided_by]
    return "threshold ≥ 1" if region.threshold >= 1 else f"diff < {region.threshold:g}"


@dataclass
class _Drawing:
    graph: GraphReport
    name: str
    opens: bool
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = lay_out(self.graph)
        plain = TOP_PLAIN if self.layout.broken is None else TOP_BROKEN
        self.top = TOP if self.graph.is_cached else plain
        self.boxes = self.layout.boxes
        self.lists = [one for one in self.graph.lists if one.in_chain and one.first is not None]
        ends = [self.boxes[one.first or 0].x + 7.6 * len(_list_name(one)) for one in self.lists[-1:]]
        self.width = max(self.layout.width, *(end + 12 for end in ends)) if ends else self.layout.width
        self.missing = self._missing()
        self.middle, self.bottom = self.top + BLOCK_HEIGHT / 2, self.top + BLOCK_HEIGHT
        self.kinds, self.kind_of = kinds_of(self.graph.blocks)
        self.skips = list(self._skips())
        self.rail = self.bottom + 36 + (SKIPS if self.skips else 0)
        self.base = self.rail + 30 + BARS  # Where the bars stand.

    def svg(self) -> str:
        width, height = self.width, self.base + 20
        parts = [self._defs(), *self._bands(), *self._lists(), *self._streams(), *self._skip_edges()]
        parts += [*self._invariants(), *self._conditionals(), *self._ends(), *self._bars(), *self._blocks()]
        parts += self._break()
        count = f"{len(self.graph.blocks)} blocks"
        label = f"Chain of {count}; the arrow keys move between blocks" if self.opens else f"Chain of {count}"
        return tag(
            "svg",
            *parts,
            class_="cx",
            viewBox=f"0 0 {width:.0f} {height:.0f}",
            width=f"{width:.0f}",
            height=f"{height:.0f}",
            role="group" if self.opens else "img",
            aria_label=label,
        )

    def _defs(self) -> str:
        line = tag("path", d="M0,8 L8,0", stroke="#000", stroke_opacity="0.35", stroke_width=2)
        return tag(
            "defs", tag("pattern", line, id=f"{self.name}-stripes", patternUnits="userSpaceOnUse", width=8, height=8)
        )

    def _bands(self) -> Iterator[str]:
        for band in self.layout.bands:
            short, long = PARTS.get(band.part, (f"region {band.region}", f"region {band.region}: runs or is skipped"))
            if not short:
                continue
            x, width = band.x - 7, band.right - band.x + 14
            kind = "region" if band.region is not None else "always"
            yield tag("rect", x=x, y=self.top - 32, width=width, height=BLOCK_HEIGHT + 42, rx=8, class_=f"band {kind}")
            yield text(x + 7, self.top - 16, long if len(long) * 7.5 < width - 10 else fit(short, width), "band-name")

    def _lists(self) -> Iterator[str]:
        ends = [self.boxes[one.first or 0].x - 12 for one in self.lists[1:]] + [self.width]
        for blocks, end in zip(self.lists, ends, strict=True):
            first = blocks.first or 0
            x, right = self.boxes[first].x, self.boxes[first + blocks.num_blocks - 1].right
            yield tag("path", d=f"M{x:.1f},34 V28 H{right:.1f} V34", class_="bracket")
            name = _list_name(blocks)
            yield tag("g", title(name), text(x, 20, fit(name, end - x, 12.5), "list"))

    def _list_of(self, number: int) -> ListReport | None:
        found = (one for one in reversed(self.lists) if (one.first or 0) <= number)
        return next(found, self.lists[0] if self.lists else None)

    def _roles(self, number: int) -> tuple[str, ...]:
        """Returns the streams that enter a block; for the number after the last block, those that leave it."""
        found = self._list_of(number)
        if found is None or found.first is None:
            return ()
        boundary = number - found.first
        return found.boundaries[boundary] if boundary < len(found.boundaries) else ()

    def _missing(self) -> str:
        """Returns the stream that ends at the place at which the chain breaks; empty if there is none."""
        broken = self.graph.broken_at
        if not broken:
            return ""
        after = self._roles(broken)
        return next((role for role in self._roles(broken - 1) if role not in after), "")

    def _stream_y(self, role: str, number: int) -> float:
        found = self._list_of(number)
        roles = found.boundaries[0] if found is not None and found.boundaries else ()
        return self.middle + (-14, 14, 0)[min(roles.index(role), 2) if role in roles else 0]

    def _streams(self) -> Iterator[str]:
        cells = self.layout.cells
        edges = [
            (cells[i - 1].box.right if i else self.layout.head.right, cell.box.x, cell.first)
            for i, cell in enumerate(cells)
        ]
        edges.append((cells[-1].box.right, self.layout.tail.x, cells[-1].last))
        for left, right, number in edges:
            for role in self._roles(number):
                y = self._stream_y(role, number)
                class_ = "stream" if y < self.middle else "stream text"
                yield tag("g", title(role), tag("line", x1=left, y1=y, x2=right, y2=y, class_=class_))
                if right - left >= 16:
                    arrow = points((right - 7, y - 4.5), (right, y), (right - 7, y + 4.5))
                    yield tag("polygon", points=arrow, class_="arrow")
            if self.missing and number == self.graph.broken_at and self.layout.broken is not None:
                y = self._stream_y(self.missing, number - 1)
                yield tag("line", x1=left, y1=y, x2=self.layout.broken - 9, y2=y, class_="stream lost")

    def _break(self) -> Iterator[str]:
        """Yields the mark of the place at which a stream ends."""
        x = self.layout.broken
        if x is None:
            return
        words = fit(self.graph.broken, self.width - 24, 12.5)
        half = 3.6 * len(words) + 10
        middle = min(max(x, half + 4), max(self.width - half - 4, half + 4))
        yield tag("line", x1=x, y1=self.top - 18, x2=x, y2=self.bottom + 18, class_="break-line")
        if self.missing:
            yield text(x, self._stream_y(self.missing, (self.graph.broken_at or 1) - 1) + 6, "✗", "lost-mark", "middle")
        label = tag("rect", x=middle - half, y=self.top - 42, width=2 * half, height=24, rx=6, class_="break-pill")
        yield tag(
            "g", title(self.graph.verdicts[0].found), label, text(middle, self.top - 26, words, "break-text", "middle")
        )

    def _skips(self) -> Iterator[tuple[int, int]]:
        """Yields (from, to) for blocks that read an output of a block other than the one before them."""
        source_of = {name: block.number for block in self.graph.blocks for name in block.makes}
        for block in self.graph.blocks:
            for source in {source_of[name] for name in block.reads if name in source_of}:
                if source < block.number - 1 and self.boxes[source] != self.boxes[block.number]:
                    yield source, block.number

    def _skip_edges(self) -> Iterator[str]:
        drawn = {(self.boxes[source], self.boxes[target]): (source, target) for source, target in self.skips}
        for (start, end), (source, target) in drawn.items():
            a, b = start.middle, end.middle
            depth = self.bottom + 20 + SKIPS * (target - source) / max(t - s for s, t in self.skips)
            path = f"M{a:.1f},{self.bottom:.1f} C{a:.1f},{depth:.1f} {b:.1f},{depth:.1f} {b:.1f},{self.bottom:.1f}"
            words = f"block {target} also reads an output of block {source}"
            yield tag("g", title(words), tag("path", d=path, class_="skip"))

    def _invariants(self) -> Iterator[str]:
        values = {value.name: value for one in self.graph.lists if one.in_chain for value in one.invariants}
        if not values:
            return
        names = ", ".join(dict.fromkeys(value.label for value in values.values()))
        first, last = self.boxes[0], self.boxes[-1]
        start = self.layout.head.middle
        path = f"M{start:.1f},{self.bottom:.1f} V{self.rail - 6:.1f} q0,6 6,6 H{last.middle:.1f}"
        ticks = "".join(f"M{c.box.middle:.1f},{self.rail:.1f} V{self.bottom:.1f}" for c in self.layout.cells)
        yield tag("path", d=path + ticks, class_="invariant")
        label = fit(f"every block reads {names}", last.right - first.x + 30, 12)
        yield tag("g", title(f"every block reads {names}"), text(first.x - 12, self.rail + 15, label, "small"))

    def _conditionals(self) -> Iterator[str]:
        for band in self.layout.bands:
            if band.conditional is not None and band.join is not None and band.region is not None:
                yield from self._conditional(band, band.conditional, band.join)

    def _conditional(self, band: Band, x: float, join: float) -> Iterator[str]:
        region = self.graph.regions[band.region or 0]
        around = (
            f"M{x:.1f},{self.middle - CONDITIONAL_HEIGHT:.1f} V{REUSE + 8:.1f} q0,-8 8,-8 "
            f"H{join - 8:.1f} q8,0 8,8 V{self.middle - 31:.1f}"
        )
        yield tag("path", d=around, class_="reuse")
        head = points((join - 5, self.middle - 35), (join, self.middle - 27), (join + 5, self.middle - 35))
        yield tag("polygon", points=head, class_="reuse-head")
        yield from self._reuse_label(x, join, region.state_bytes, region.cost.flops)
        corners = (
            (x - CONDITIONAL_WIDTH, self.middle),
            (x, self.middle - CONDITIONAL_HEIGHT),
            (x + CONDITIONAL_WIDTH, self.middle),
        )
        diamond = tag("polygon", points=points(*corners, (x, self.middle + CONDITIONAL_HEIGHT)), class_="conditional")
        words = f"{region.name}: probe {region.probe}; a step is reused if: {reuses_when(region)}"
        yield tag("g", title(words), diamond, text(x, self.middle + 4, "reuse?", "conditional-text", "middle"))
        yield text(x + 6, self.middle - CONDITIONAL_HEIGHT - 5, "yes", "small strong")
        yield text(x + 19, self.middle - 20, "no", "small strong")
        yield text(x, self.bottom + 18, reuses_when(region), "small strong", "middle")
        capsule = tag(
            "rect", x=join - JOIN_WIDTH, y=self.middle - 26, width=2 * JOIN_WIDTH, height=52, rx=10, class_="join"
        )
        yield tag(
            "g",
            title("Both branches return the same values"),
            capsule,
            text(join, self.middle + 5, "+", "plus", "middle"),
        )

    def _reuse_label(self, x: float, join: float, state_bytes: int, saved: int) -> Iterator[str]:
        room = join - x - 60
        longest = f"reuse: adds the cached values ({size(state_bytes)}), saves {flops(saved)}"
        labels = (longest, f"reuse: saves {flops(saved)}", "reuse")
        label = next((words for words in labels if len(words) * 7.4 < room), "reuse")
        width = len(label) * 7.6 + 20
        middle = min((x + join) / 2, x + 60 + width / 2)  # Near the left end of a long path.
        yield tag("rect", x=middle - width / 2, y=REUSE - 10, width=width, height=20, rx=10, class_="pill")
        yield text(middle, REUSE + 4, label, "reuse-text", "middle")

    def _ends(self) -> Iterator[str]:
        named = ("head", "tail") if self.graph.is_cached else ("before", "after")
        for box, name in zip((self.layout.head, self.layout.tail), named, strict=True):
            yield tag("rect", x=box.x, y=self.top + 8, width=box.width, height=BLOCK_HEIGHT - 16, rx=8, class_="end")
            yield text(box.middle, self.middle + 4, name, "", "middle")

    def _bars(self) -> Iterator[str]:
        most = max((block.cost.flops for block in self.graph.blocks), default=0)
        if not most:
            return
        box = self.layout.head
        yield text(box.x, self.base - 15, "FLOPs of", "small")
        yield text(box.x, self.base - 1, "a block", "small")
        for cell in self.layout.cells:
            block, box = self.graph.blocks[cell.first], cell.box
            height = BARS * block.cost.flops / most
            bar = tag("rect", x=box.x, y=self.base - height, width=box.width, height=height, class_="bar")
            each = " each" if cell.count > 1 else ""
            yield tag("g", title(f"{self._path(cell)}: {flops(block.cost.flops)}{each}"), bar)
        x, right = self.boxes[0].x, self.boxes[-1].right
        yield tag("line", x1=x, y1=self.base, x2=right, y2=self.base, class_="axis")
        yield text(x, self.base + 15, f"at most {flops(most)}", "small")

    def _blocks(self) -> Iterator[str]:
        for number, cell in enumerate(self.layout.cells):
            yield self._block(self.graph.blocks[cell.first]) if cell.count == 1 else self._stack(cell, number)

    def _path(self, cell: Cell) -> str:
        return path_of(self.graph.blocks[cell.first : cell.last])

    def _body(self, cell: Cell, lines: list[tuple[str, str]]) -> list[str]:
        """Returns the box of a block, or the boxes of a stack, with lines of text and their classes."""
        kind, box = self.kinds[self.kind_of[cell.first]], cell.box
        parts = []
        for depth in (2, 1, 0) if cell.count > 1 else (0,):
            shape = dict(
                x=box.x + STACK / 2 * depth, y=self.top - STACK / 2 * depth, width=box.width, height=BLOCK_HEIGHT, rx=6
            )
            parts.append(tag("rect", **shape, class_="body", fill=kind.color))
            if kind.is_striped and not depth:
                parts.append(tag("rect", **shape, fill=f"url(#{self.name}-stripes)"))
        tops = (28, 48, 67)
        for y, (content, class_) in zip(tops, lines, strict=False):
            parts.append(text(box.middle, self.top + y, fit(content, box.width + 4, 12), class_, "middle"))
        return parts

    def _block(self, block: BlockReport) -> str:
        kind = self.kinds[self.kind_of[block.number]]
        place = f"region {block.region}" if block.region is not None else block.part
        label = ", ".join(filter(None, (f"Block {block.number}", block.path, block.cls, place, kind.name)))
        lines = [(_number_of(block), "number"), (kind.short, "piece")]
        if self.layout.is_wide:
            lines.append((flops(block.cost.flops), "cost"))
        cell = Cell(block.number, block.number + 1, self.boxes[block.number])
        parts = [title(label), *self._body(cell, lines)]
        is_blamed = block.path == self.graph.blamed
        class_ = "block blamed" if is_blamed else "block"
        if not self.opens:
            return tag("g", *parts, class_=class_)
        focus = "0" if block.number == 0 else "-1"
        button = dict(role="button", tabindex=focus, aria_haspopup="dialog", data_block=f"{self.name}-{block.number}")
        return tag("g", *parts, class_=f"{class_} opens", aria_label=label, **button)

    def _stack(self, cell: Cell, number: int) -> str:
        """Returns several equal blocks, drawn as one."""
        first, last = self.graph.blocks[cell.first], self.graph.blocks[cell.last - 1]
        kind = self.kinds[self.kind_of[cell.first]]
        place = f"region {first.region}" if first.region is not None else first.part
        label = ", ".join(filter(None, (self._path(cell), f"{cell.count} equal blocks", first.cls, place, kind.name)))
        numbers = f"{_number_of(first)}–{_number_of(last)}"
        parts = [
            title(label),
            *self._body(cell, [(numbers, "number"), (f"× {cell.count}", "times"), (kind.short, "piece")]),
        ]
        if not self.opens:
            return tag("g", *parts, class_="block stack")
        button = dict(role="button", tabindex="0", aria_expanded="false", aria_controls=f"{self.name}-stack-{number}")
        return tag("g", *parts, class_="block stack", aria_label=f"{label}; show the blocks", **button)


def path_of(blocks: Sequence[BlockReport]) -> str:
    """Returns the path of a block, or of several blocks of one list: `transformer_blocks.1–18`."""
    first, last = blocks[0], blocks[-1]
    return first.path if first is last else f"{first.path}–{_number_of(last)}"


def _list_name(blocks: ListReport) -> str:
    return f"{' and '.join((blocks.path, *blocks.alternates))}: {blocks.num_blocks} blocks"


def _number_of(block: BlockReport) -> str:
    return block.path.rpartition(".")[2] or str(block.number)
