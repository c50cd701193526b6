"""Regions, their live-outs, and the groups of block lists that share a region, as data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, CacheType, Changes
from cachedit_fx.passes.analysis.joined_streams import StreamJoins
from cachedit_fx.patterns.blocks import Block
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch, MismatchError
from cachedit_fx.patterns.nodes import depends_on_data, same_shape, source_line, value_of


@dataclass(frozen=True, slots=True)
class LiveOut:
    """A value that is computed in a region and used after it.

    Attributes:
        role: Role of the stream that the value continues; the name of the node if it continues no stream; "output" for
            the output of the graph ("output_0" and so on if it has several).
        before: The stream that enters the region; None if the value itself is cached, not a residual.
        after: The node in the region that computes the value.
        joins: How `before` follows from the streams at the cut, if lists are joined in the region; None if `before` is
            a stream at the cut.
    """

    role: str
    before: fx.Node | None
    after: fx.Node
    joins: StreamJoins | None = None

    @property
    def is_measured(self) -> bool:
        """Whether every step has to check that the stream keeps its shape, because its sizes depend on data."""
        if self.before is None:
            return False
        sizes = (*value_of(self.before).shape, *value_of(self.after).shape)
        return not same_shape(self.before, self.after) or any(map(depends_on_data, sizes))


@dataclass(frozen=True, slots=True)
class RankGroup:
    """A process group: its name in `torch.distributed`, and the ranks of its members."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """The blocks between two cuts, and what its conditional needs.

    Attributes:
        name: For example `transformer_blocks[1:4]`. The names of joined lists are separated by `+`.
        first, last: Numbers in the chain of the first block of the region and of the first block after it.
        nodes: The nodes of the region in program order.
        overrides: The fields of the configuration that this region sets itself.
        probed_at: The node that is the probe: the hidden stream after the Fn blocks or before a single block, or the
            modulated input of the first block. None if there is no probe.
        probed_since: The hidden stream before the Fn blocks, which is subtracted from `probed_at` to get a residual;
            None if `probed_at` itself is the probe.
        live_outs: The values that a reused step has to supply.
        hoisted: Nodes between the cuts that run in the head, at every step: those that do not depend on a stream, and
            those that compute the modulated input.
        deferred: Nodes before the first cut that only `nodes` read. They run in the region.
        reaches_output: Whether the region extends to the end of the graph. Its live-outs are then the outputs.
        sample_dim: The dimension of the probe that is the batch. Every sample has a residual diff of its own, and the
            largest one counts. None: one residual diff for the whole batch.
        groups: The process groups over which the regions of the graph communicate. Their ranks decide alike.
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
    groups: tuple[RankGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive lists of the chain that share one configuration and therefore one region.

    Attributes:
        config: The configuration of the group, including `overrides`.
        overrides: The fields of the configuration that this group sets itself.
        number: Number of its first block in the chain.
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
        """The streams before every block and after the last one. Between two lists: those that enter the second."""
        streams: list[Mapping[str, fx.Node]] = []
        for match in self.matches:
            streams = [*streams[:-1], *match.blocks.boundaries]
        return streams

    @property
    def ends(self) -> list[tuple[Match, int]]:
        """Each list, with the number in the group of the first block after it."""
        counts = itertools.accumulate(len(match.blocks.blocks) for match in self.matches)
        return list(zip(self.matches, counts, strict=True))

    @property
    def kinds(self) -> dict[str, str]:
        """Role -> "residual" or "value", as declared by the templates of the first and the last list."""
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


def mismatch_error(
    match: Match,
    cause: Cause,
    expected: str,
    found: str,
    node: fx.Node | None = None,
    *,
    stream: str | None = None,
) -> MismatchError:
    """The error for a list that fits its template but cannot be cut."""
    total = len(match.blocks.blocks)
    return MismatchError(
        Mismatch(
            match.template,
            cause,
            expected,
            found,
            node=node.name if node is not None else None,
            where=source_line(node),
            stream=stream,
            progress=total,
            total=total,
        )
    )
