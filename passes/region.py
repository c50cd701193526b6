"""What lies between two cuts, as data: the region, what it carries, and the lists that are decided about together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, CacheType, Changes
from cachedit_fx.passes.analysis.joined_streams import StreamJoins
from cachedit_fx.patterns.blocks import Block
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch
from cachedit_fx.patterns.nodes import depends_on_data, same_shape, source_line, value_of


@dataclass(frozen=True, slots=True)
class LiveOut:
    """A value that leaves a region and is needed after it.

    Attributes:
        role: The stream's role; the node's name for a value that continues no stream; "output" for what the graph
            returns, "output_0" and so on where that is more than one.
        before: The stream where it enters the region; None if the value is cached as it is.
        after: The node that makes it, in the region.
        joins: How `before` follows from the streams at the cut, where lists are joined behind it; None: it is there.
    """

    role: str
    before: fx.Node | None
    after: fx.Node
    joins: StreamJoins | None = None

    @property
    def is_measured(self) -> bool:
        """Whether only the tensors themselves tell that the stream keeps its shape: its sizes depend on data."""
        if self.before is None:
            return False
        sizes = (*value_of(self.before).shape, *value_of(self.after).shape)
        return not same_shape(self.before, self.after) or any(map(depends_on_data, sizes))


@dataclass(frozen=True, slots=True)
class Region:
    """The blocks between two cuts, and all that a conditional needs to know of them.

    Attributes:
        name: As in `transformer_blocks[1:4]`; two lists are joined by `+`.
        first, last: Numbers of the chain's first block in the region and the first after it.
        nodes: The region's nodes in program order.
        overrides: What of the configuration is for this region alone.
        probed_at: The probe: the hidden stream behind the Fn blocks, or in front of a single block, or
            the first block's modulated input. None: nothing is looked at.
        probed_since: What is taken off it first: the hidden stream before the Fn blocks; None to look at the value.
        live_outs: What a reused step has to supply.
        hoisted: Nodes that lie between the cuts but run with the head, at every step: what depends on no stream, and
            what makes the modulated input.
        deferred: Nodes from before the first cut that nothing but `nodes` reads: they run with these.
        reaches_output: It ends where the graph does, and carries what the graph returns.
        sample_dim: Dimension of what is looked at whose entries are samples, each with a diff of its own, of which the
            largest counts; None: one diff over the whole batch.
    """

    name: str
    first: int
    last: int
    nodes: tuple[fx.Node, ...]
    overrides: Changes | None
    probed_at: fx.Node | None
    probed_since: fx.Node | None
    live_outs: tuple[LiveOut, ...]
    hoisted: tuple[fx.Node, ...]
    deferred: tuple[fx.Node, ...] = ()
    reaches_output: bool = False
    sample_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Lists of the chain that follow each other and are decided about by one configuration.

    Attributes:
        overrides: What this group's regions do differently from the whole model's configuration; `config` includes it.
        number: Of its first block in the chain.
    """

    matches: tuple[Match, ...]
    config: CacheConfig
    overrides: Changes | None = None
    number: int = 0

    @property
    def blocks(self) -> list[Block]:
        return [block for match in self.matches for block in match.blocks.blocks]

    @property
    def paths(self) -> str:
        return "+".join(match.blocks.path for match in self.matches)

    @property
    def boundaries(self) -> list[Mapping[str, fx.Node]]:
        """Streams before every block, and after the last. Where two lists meet, the later one's entry."""
        streams: list[Mapping[str, fx.Node]] = []
        for match in self.matches:
            streams = [*streams[:-1], *match.blocks.boundaries]
        return streams

    @property
    def ends(self) -> list[tuple[Match, int]]:
        """Each list with the number of the first block after it."""
        counts = itertools.accumulate(len(match.blocks.blocks) for match in self.matches)
        return list(zip(self.matches, counts, strict=True))

    @property
    def kinds(self) -> dict[str, str]:
        """How the templates want roles to be cached, where that is said: "residual" or "value"."""
        return {**self.matches[0].template.cached, **self.matches[-1].template.cached}


def region_name(group: Group, first: int, last: int) -> str:
    """`transformer_blocks[1:4]`: the group's blocks `first` to `last` (exclusive)."""
    parts, offset = [], 0
    for match in group.matches:
        count = len(match.blocks.blocks)
        low, high = max(0, first - offset), min(count, last - offset)
        if low < high:
            part = f"[{low}]" if group.config.cache_type == CacheType.DBPrune else f"[{low}:{high}]"
            parts.append(match.blocks.path + ("" if (low, high) == (0, count) else part))
        offset += count
    return "+".join(parts)


def mismatch_of(match: Match, cause: Cause, detail: str, node: fx.Node | None = None) -> Mismatch:
    """Why a list that fits its template cannot be cut."""
    total = len(match.blocks.blocks)
    return Mismatch(
        match.template, cause, detail, node.name if node is not None else None, source_line(node), total, total
    )
