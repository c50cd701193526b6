"""Draws the chain of a graph as SVG: blocks, streams, conditionals and reuse branches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cachedit_fx.inspect.explanation.data import BlockReport, GraphReport, ListReport, RegionReport
from cachedit_fx.inspect.explanation.units import flops, size
from cachedit_fx.inspect.pages.layout import BLOCK_HEIGHT, Band, Layout, lay_out
from cachedit_fx.inspect.pages.pieces import kinds_of
from cachedit_fx.inspect.pages.svg import fit, points, tag, text, title

TOP = 104.0  # Top of the blocks, below the path around a region.
TOP_PLAIN = 46.0  # Top of the blocks in a graph that is not cached.
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
        opens: Whether the blocks are buttons that open a panel.
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
        self.top = TOP if self.graph.is_cached else TOP_PLAIN
        self.middle, self.bottom = self.top + BLOCK_HEIGHT / 2, self.top + BLOCK_HEIGHT
        self.kinds, self.kind_of = kinds_of(self.graph.blocks)
        self.skips = list(self._skips())
        self.rail = self.bottom + 34 + (SKIPS if self.skips else 0)
        self.base = self.rail + 30 + BARS  # Where the bars stand.

    def svg(self) -> str:
        width, height = self.layout.width, self.base + 20
        parts = [self._defs(), *self._bands(), *self._lists(), *self._streams(), *self._skip_edges()]
        parts += [*self._invariants(), *self._conditionals(), *self._ends(), *self._bars(), *self._blocks()]
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
            yield tag("rect", x=x, y=self.top - 26, width=width, height=BLOCK_HEIGHT + 36, rx=8, class_=f"band {kind}")
            yield text(x + 7, self.top - 10, long if len(long) * 7 < width - 10 else fit(short, width), "band-name")

    def _lists(self) -> Iterator[str]:
        for blocks in self.graph.lists:
            if not blocks.in_chain or blocks.first is None or blocks.first >= len(self.layout.boxes):
                continue
            last = min(blocks.first + blocks.num_blocks, len(self.layout.boxes)) - 1
            x, right = self.layout.boxes[blocks.first].x, self.layout.boxes[last].right
            names = " and ".join((blocks.path, *blocks.alternates))
            yield tag("path", d=f"M{x:.1f},34 V28 H{right:.1f} V34", class_="bracket")
            yield tag(
                "g", title(names), text(x, 20, fit(f"{names}: {blocks.num_blocks} blocks", right - x + 12), "list")
            )

    def _list_of(self, number: int) -> ListReport | None:
        chained = [one for one in self.graph.lists if one.in_chain and one.first is not None]
        return next((one for one in reversed(chained) if (one.first or 0) <= number), chained[0] if chained else None)

    def _roles(self, number: int) -> list[str]:
        """Returns the streams that enter a block; for the number after the last block, those that leave it."""
        found = self._list_of(number)
        roles = [value.role for value in found.streams if value.role] if found is not None else []
        if number and self.graph.blocks[number - 1].makes:
            roles = sorted(roles, key=ROLES.index)[: len(self.graph.blocks[number - 1].makes)]
        return roles or [ROLES[0]]

    def _streams(self) -> Iterator[str]:
        boxes = self.layout.boxes
        for number in range(len(boxes) + 1):
            left = boxes[number - 1].right if number else self.layout.head.right
            right = boxes[number].x if number < len(boxes) else self.layout.tail.x
            for role in self._roles(number):
                y = self.middle - 14 if role == ROLES[0] else self.middle + 14
                class_ = "stream" if role == ROLES[0] else "stream text"
                yield tag("g", title(role), tag("line", x1=left, y1=y, x2=right, y2=y, class_=class_))
                if right - left >= 16:
                    arrow = points((right - 7, y - 4.5), (right, y), (right - 7, y + 4.5))
                    yield tag("polygon", points=arrow, class_="arrow")

    def _skips(self) -> Iterator[tuple[int, int]]:
        """Yields (from, to) for blocks that read an output of a block other than the one before them."""
        source_of = {name: block.number for block in self.graph.blocks for name in block.makes}
        for block in self.graph.blocks:
            for source in {source_of[name] for name in block.reads if name in source_of}:
                if source < block.number - 1:
                    yield source, block.number

    def _skip_edges(self) -> Iterator[str]:
        for source, target in self.skips:
            a, b = self.layout.boxes[source].middle, self.layout.boxes[target].middle
            depth = self.bottom + 20 + SKIPS * (target - source) / max(t - s for s, t in self.skips)
            path = f"M{a:.1f},{self.bottom:.1f} C{a:.1f},{depth:.1f} {b:.1f},{depth:.1f} {b:.1f},{self.bottom:.1f}"
            words = f"block {target} also reads an output of block {source}"
            yield tag("g", title(words), tag("path", d=path, class_="skip"))

    def _invariants(self) -> Iterator[str]:
        values = {value.name: value for one in self.graph.lists if one.in_chain for value in one.invariants}
        if not values:
            return
        names = ", ".join(dict.fromkeys(value.label for value in values.values()))
        first, last = self.layout.boxes[0], self.layout.boxes[-1]
        start = self.layout.head.middle
        path = f"M{start:.1f},{self.bottom:.1f} V{self.rail - 6:.1f} q0,6 6,6 H{last.middle:.1f}"
        ticks = "".join(f"M{box.middle:.1f},{self.rail:.1f} V{self.bottom:.1f}" for box in self.layout.boxes)
        yield tag("path", d=path + ticks, class_="invariant")
        label = fit(f"every block reads {names}", last.right - first.x + 30, 10.5)
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
        yield text(x, self.bottom + 16, reuses_when(region), "small", "middle")
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
        label = next((words for words in labels if len(words) * 7 < room), "reuse")
        width = len(label) * 6.8 + 20
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
        yield text(box.x, self.base - 14, "FLOPs of", "small")
        yield text(box.x, self.base - 2, "each block", "small")
        for block, box in zip(self.graph.blocks, self.layout.boxes, strict=True):
            height = BARS * block.cost.flops / most
            bar = tag("rect", x=box.x, y=self.base - height, width=box.width, height=height, class_="bar")
            yield tag("g", title(f"{block.path}: {flops(block.cost.flops)}"), bar)
        x, right = self.layout.boxes[0].x, self.layout.boxes[-1].right
        yield tag("line", x1=x, y1=self.base, x2=right, y2=self.base, class_="axis")
        yield text(x, self.base + 14, f"at most {flops(most)}", "small")

    def _blocks(self) -> Iterator[str]:
        for block in self.graph.blocks:
            yield self._block(block)

    def _block(self, block: BlockReport) -> str:
        box, kind = self.layout.boxes[block.number], self.kinds[self.kind_of[block.number]]
        place = f"region {block.region}" if block.region is not None else block.part
        label = ", ".join(filter(None, (f"Block {block.number}", block.path, block.cls, place, kind.name)))
        shape = dict(x=box.x, y=self.top, width=box.width, height=BLOCK_HEIGHT, rx=6)
        parts = [title(label), tag("rect", **shape, class_="body", fill=kind.color)]
        if kind.is_striped:
            parts.append(tag("rect", **shape, fill=f"url(#{self.name}-stripes)"))
        number = block.path.rpartition(".")[2] or str(block.number)
        parts.append(text(box.middle, self.top + 30, fit(number, box.width), "number", "middle"))
        parts.append(text(box.middle, self.top + 48, kind.short, "piece", "middle"))
        if self.layout.is_wide:
            parts.append(text(box.middle, self.top + 64, fit(flops(block.cost.flops), box.width, 10), "cost", "middle"))
        if not self.opens:
            return tag("g", *parts, class_="block")
        focus = "0" if block.number == 0 else "-1"
        button = dict(role="button", tabindex=focus, aria_haspopup="dialog", data_block=f"{self.name}-{block.number}")
        return tag("g", *parts, class_="block opens", aria_label=label, **button)
