"""The results of `explain` as frozen dataclasses, which JSON can store (`Explanation.to_dict`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of some nodes of a graph, at the shapes of the explained call.

    Attributes:
        flops: Floating-point operations of matrix products, attention and convolutions. A multiplication with its
            addition counts as two. Source: `torch.utils.flop_counter`.
        moved_bytes: Bytes that the aten operations of the nodes read and write if nothing is fused. Views are not
            counted.
        weight_bytes: Bytes of the parameters and buffers that the nodes read.
    """

    flops: int = 0
    moved_bytes: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.moved_bytes + other.moved_bytes, self.weight_bytes + other.weight_bytes
        )


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph.

    Attributes:
        name: The name of its node.
        label: Its name in the code of the model.
        shape: Its sizes. A size that is not known before the call is given as its symbol ("s27", "u0").
        dtype: Its dtype, such as "float32".
        nbytes: Its size in bytes, at the sizes of the explained call.
        role: The role of a stream, such as "hidden_states"; empty if it is not a stream.
    """

    name: str
    label: str
    shape: tuple[str, ...]
    dtype: str
    nbytes: int
    role: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.shape)}]"


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block of the chain.

    Attributes:
        number: Its number in the chain, from 0, over all block lists.
        path: The path of its module, such as `transformer_blocks.3`.
        cls: The name of its class; empty if Dynamo did not record it.
        part: "Fn" (always runs), "region" (runs or is skipped), "Bn" (always runs), "between" (always runs, between
            two regions) or "" (the graph is not cached).
        region: The number of its region; None if it is in no region.
        piece: The number of the compiled piece that it shares with blocks of equal structure; None if it is not
            compiled as a piece of its own.
        num_nodes: The number of its nodes, including those between it and the next block.
        cost: The cost of these nodes.
        where: `file.py:line` of its first operation.
        reads: The values computed before the block that it reads, in order: streams and invariants, but no weights.
        makes: The streams that it passes on.
        code: Its nodes as Python code, one line each.
    """

    number: int
    path: str
    cls: str
    part: str
    region: int | None
    piece: int | None
    num_nodes: int
    cost: Cost
    where: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    code: str


@dataclass(frozen=True, slots=True)
class PartReport:
    """A part of a cached graph. Every node of the graph is in exactly one part.

    Attributes:
        name: "head", "Fn blocks", "region 0", "between" (between two regions), "Bn blocks" or "tail".
        flops: The FLOPs of the part.
        is_skipped: Whether a reused step skips the part.
    """

    name: str
    flops: int
    is_skipped: bool


@dataclass(frozen=True, slots=True)
class ListReport:
    """One block list.

    Attributes:
        path: Its path, such as `transformer_blocks`.
        alternates: The paths of the lists that are called alternately with it.
        pattern: The template that it fits, such as "pattern 1 (dual-stream, encoder first)"; empty if none fits.
        in_chain: Whether it is part of the chain, or of what comes nearest to a chain if the graph has none. Other
            lists (such as those of a text encoder) always run.
        first: The number of its first block in the chain; None if it is not part of the chain.
        num_blocks: The number of its blocks, at least two.
        streams: The streams that enter its first block.
        invariants: The values computed before it that every block reads.
        lost_at: Index of the first boundary at which no stream continues (boundary i lies before block i); None if a
            stream continues to the end.
        loss: The same in words; empty if `lost_at` is None.
        boundaries: The roles of the streams at every boundary, up to the first one at which no stream continues.
    """

    path: str
    alternates: tuple[str, ...]
    pattern: str
    in_chain: bool
    first: int | None
    num_blocks: int
    streams: tuple[Value, ...]
    invariants: tuple[Value, ...]
    lost_at: int | None
    loss: str
    boundaries: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a template does not fit, or why nothing can be cached: a mismatch, as JSON takes it.

    Attributes:
        template: For example "pattern 2 (cross-attention)"; empty if the graph cannot be cached with any template.
        cause: The value of a `Cause`, for example "stream-count".
        expected, found: What was expected and what was found.
        fitted, total: Number of blocks that fit before the first one that does not, and number of blocks.
        block: Path of the block that contains the node, or that precedes it; empty if there is none.
        following: Path of the next block if the node is between two blocks; otherwise empty.
        node: Name of the node that shows the mismatch.
        where: `file.py:line` of the user's code that created the node.
        line: This line.
        cure: What to do.
        stream: Role of the stream that is concerned; empty if no particular one is.
        lost_at: Index of the boundary at which a stream is missing (boundary i lies before block i); None if none is.
        path: Path of the list; empty if no particular list is concerned.
    """

    template: str
    cause: str
    expected: str
    found: str
    fitted: int
    total: int
    block: str
    node: str
    where: str
    line: str
    cure: str
    stream: str = ""
    lost_at: int | None = None
    path: str = ""
    following: str = ""

    @property
    def where_short(self) -> str:
        """`where` without the folder."""
        return self.where.rpartition("/")[2]

    @property
    def is_registered(self) -> bool:
        """Whether the template is one that a user registered."""
        return self.template.startswith("template ")

    @property
    def place(self) -> str:
        """The block, or the two blocks, at which the mismatch is; empty if it is not known."""
        return f"between {self.block} and {self.following}" if self.following else self.block and f"block {self.block}"


@dataclass(frozen=True, slots=True)
class CachedValueReport:
    """A live-out of a region, which a reused step computes from a cached value.

    Attributes:
        value: The live-out.
        cached_as: "residual" (a reused step adds what the region added last time) or "value" (a reused step uses the
            value of the last time).
        since: The name of the value that the residual is taken against; empty for a value.
        is_joined: Whether the residual is taken against the streams joined in the way in which the model joins them
            inside the region.
        is_measured: Whether its sizes depend on data, so that every step checks its shape.
    """

    value: Value
    cached_as: str
    since: str
    is_joined: bool
    is_measured: bool


@dataclass(frozen=True, slots=True)
class RegionReport:
    """A region: the blocks between two cuts, which a step computes or reuses.

    Attributes:
        name: Its name, such as `transformer_blocks[1:]`; followed by `-> output` if it reaches to the output.
        first: The number of its first block in the chain.
        last: The number of the first block after it.
        decided_by: What a step is decided by: "diff" (the residual diff of the probe), "ratios" (magnitude_ratios),
            "decider" or "mask". There is a probe only with "diff".
        probe: A description of its probe.
        cached: Its live-outs.
        state_bytes: The bytes that a session caches for it at these shapes: the probe and all of `cached`.
        cost: The cost of its nodes, which a reused step saves, except for adding the cached values.
        threshold: The value of `residual_diff_threshold` for it.
        reaches_output: Whether it extends to what the graph returns. It then also contains nodes before its blocks
            that nothing else reads.
        guidance: With `guidance_reuse`, whether a guidance branch may follow another one in it, as a sentence.
    """

    name: str
    first: int
    last: int
    decided_by: str
    probe: str
    cached: tuple[CachedValueReport, ...]
    state_bytes: int
    cost: Cost
    threshold: float
    reaches_output: bool = False
    guidance: str = ""


@dataclass(frozen=True, slots=True)
class PieceReport:
    """A piece: one graph that the inner backend compiles.

    Attributes:
        number: Its number, from 0.
        blocks: The numbers of the blocks that share it; empty if it contains the nodes around the blocks.
        segments: The segments that call it, each once: "head", "compute_0", "reuse_0", "tail".
        num_nodes: The number of its nodes, including placeholders and output.
        cost: The cost of one call.
    """

    number: int
    blocks: tuple[int, ...]
    segments: tuple[str, ...]
    num_nodes: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class BreakReport:
    """A graph break.

    Attributes:
        reason: Dynamo's reason.
        where: `file.py:line` of the user's code.
        line: The text of this line.
    """

    reason: str
    where: str
    line: str


@dataclass(frozen=True, slots=True)
class RiskReport:
    """An argument that a graph is specialized on. Another value triggers a recompilation, up to `recompile_limit`.

    Attributes:
        what: The argument, such as "hidden_states" or "joint_attention_kwargs['scale']".
        found: Its value in the explained call.
        consequence: What happens with another value.
    """

    what: str
    found: str
    consequence: str


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph that Dynamo captured of one transformer.

    Attributes:
        module: The name of the transformer in the pipeline; empty if the transformer itself was explained.
        cls: The name of the class of the transformer.
        number: The number of the graph, from 0. A transformer that Dynamo breaks up has several graphs.
        is_cached: Whether the graph gets a conditional.
        num_nodes: The number of its nodes as captured, including weights and inputs.
        arguments: The tensors that the caller passes, without the weights.
        cost: The cost of the whole graph.
        is_estimated: Whether the costs are estimates from shapes, because operations could not be run on fake tensors.
        lists: Its block lists, in execution order.
        blocks: The blocks of the chain, in execution order. If the graph has no chain, those of the list that comes
            nearest to one.
        verdicts: Why it is not cached, nearest miss first. For a cached graph, why registered templates that were tried
            before the one that fits do not fit.
        regions: Its regions; empty if it is not cached.
        parts: Its parts, in execution order; empty if it is not cached.
        pieces: Its pieces; empty if it is not cached.
        timestep: The name of the timestep input; empty if there is none.
        conditioning: The name of the input that identifies the prompt; empty if there is none.
        saved_flops: The share of the FLOPs of the graph that a step saves if every region is reused, from 0 to 1.
        state_bytes: The bytes that a session caches at these shapes.
        break_after: Why the graph ends before the model does; None for the last graph.
        risks: The arguments that it is specialized on.
    """

    module: str
    cls: str
    number: int
    is_cached: bool
    num_nodes: int
    arguments: tuple[Value, ...]
    cost: Cost
    is_estimated: bool
    lists: tuple[ListReport, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    regions: tuple[RegionReport, ...] = ()
    parts: tuple[PartReport, ...] = ()
    pieces: tuple[PieceReport, ...] = ()
    timestep: str = ""
    conditioning: str = ""
    saved_flops: float = 0.0
    state_bytes: int = 0
    break_after: BreakReport | None = None
    risks: tuple[RiskReport, ...] = field(default_factory=tuple)

    @property
    def broken_at(self) -> int | None:
        """The number of the first block before which a stream ends, so that the graph is not cached.

        It is the number of blocks if a stream ends after the last one, and None if no stream ends.
        """
        nearest = self.verdicts[0] if self.verdicts and not self.is_cached else None
        if nearest is None or nearest.lost_at is None:
            return None
        first = next((one.first for one in self.lists if one.path == nearest.path and one.in_chain), None)
        return None if first is None else first + nearest.lost_at

    @property
    def blamed(self) -> str:
        """The path of the block at which the nearest mismatch is, if it is in a block; otherwise empty."""
        nearest = self.verdicts[0] if self.verdicts and not self.is_cached else None
        return "" if nearest is None or nearest.following or nearest.lost_at is not None else nearest.block

    @property
    def broken(self) -> str:
        """What breaks the chain there, in a few words; empty if nothing does."""
        if self.broken_at is None:
            return ""
        nearest = self.verdicts[0]
        return f"{nearest.stream or 'the stream'} ends here{f' ({nearest.where_short})' if nearest.where else ''}"


@dataclass(frozen=True, slots=True)
class Captured:
    """How one transformer was captured.

    Attributes:
        module: Its name in the pipeline; empty if the transformer itself was explained.
        cls: The name of its class.
        how: "whole" or "in parts", which "with sizes that depend on data" may follow; "not at all" if a cache of
            diffusers is enabled.
        why: Why Dynamo could not capture it whole; empty if it could.
        line: The line of code at which it could not.
        reason: Why it is not cached, on one line, as `summary` shows it for a call; empty if it is cached.
        cure: What to do so that it is cached; empty if it is cached.
        message: What `enable_cache` logs when such a call runs without the cache; empty if it is cached.
        config: The fields of its `CacheConfig` that were given or differ from the defaults.
    """

    module: str
    cls: str
    how: str
    why: str
    config: dict[str, Any]
    reason: str = ""
    cure: str = ""
    message: str = ""
    line: str = ""
