"""What `explain` found out, as data: frozen, and as JSON takes it (`Explanation.to_dict`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """What some nodes of a graph cost at the shapes of the explained call.

    Attributes:
        flops: Floating point operations of matrix products, attention and convolutions; a multiplication with its
            addition counts two. Source: `torch.utils.flop_counter`.
        moved_bytes: Bytes that their aten operations read and write, each operation on its own (nothing fused); views
            move nothing.
        weight_bytes: Of the parameters and buffers that they read.
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
        name: Of the graph's node.
        label: What the model's code calls it.
        shape: Sizes; one that is not known before the call is written as its symbol ("s27", "u0").
        dtype: As in "float32".
        nbytes: At the sizes of the explained call.
        role: "hidden_states" or "encoder_hidden_states" for a stream; empty for what is none.
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
        number: In the chain, from 0, over all of its lists.
        path: Of its module, as in `transformer_blocks.3`.
        cls: Its class; empty where Dynamo did not keep it.
        part: "Fn" (always runs, and is looked at), "region" (runs or is skipped), "Bn" (always runs) or "" (it matched,
            but the graph is not cached).
        region: Number of its region; None outside of one.
        piece: Number of the compiled piece that it shares with blocks of equal structure; None where blocks are not
            compiled apart.
        num_nodes: Nodes of the graph, with the work between it and the next block.
        cost: Of these nodes.
        where: `file.py:line` of its first own operation.
        reads: Values from before the block that it reads, in order: streams, invariants; no weights.
        makes: Streams that it hands on.
        code: Its nodes as Python, a line each.
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
class ListReport:
    """One list of blocks that was found.

    Attributes:
        path: As in `transformer_blocks`; `alternates` is the list that takes turns with it, if one does.
        pattern: The template that it fits, as in "pattern 1 (dual-stream, encoder first)"; empty if none does.
        in_chain: Whether it is a part of the chain; other lists (a text encoder's) run as they are.
        first: Number of its first block in the chain; None outside of it.
        num_blocks: At least two.
        streams: What enters its first block.
        invariants: Values made before it that every block reads.
        lost_at: Index of the first boundary at which no stream continues (boundary i lies before block i); None if a
            stream continues to the end.
        loss: The same in words; empty if `lost_at` is None.
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a template does not fit, or why nothing can be cached: a mismatch, as JSON takes it.

    Attributes:
        template: For example "pattern 2 (cross-attention)"; empty if the graph cannot be cached with any template.
        cause: The value of a `Cause`, for example "stream-count".
        expected, found: What was expected and what was found.
        fitted, total: Number of blocks that fit before the first one that does not, and number of blocks.
        block: Path of the block that contains the node; empty if no block does.
        node: Name of the node that shows the mismatch.
        where: `file.py:line` of the user's code that created the node.
        line: This line.
        cure: What to do.
        stream: Role of the stream that is concerned; empty if no particular one is.
        lost_at: Index of the boundary at which a stream is missing (boundary i lies before block i); None if none is.
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


@dataclass(frozen=True, slots=True)
class CachedValueReport:
    """A value that a reused step supplies.

    Attributes:
        value: Where it leaves the region.
        cached_as: "residual" (a reused step adds what the region added last time) or "value" (it takes it as it was).
        since: Name of what the residual is taken against; empty for a value.
        is_joined: The residual is taken against the streams joined as the model joins them inside the region.
        is_measured: Its sizes depend on data, so every step measures whether it kept its shape.
    """

    value: Value
    cached_as: str
    since: str
    is_joined: bool
    is_measured: bool


@dataclass(frozen=True, slots=True)
class RegionReport:
    """The blocks between two cuts: what the conditional runs or skips.

    Attributes:
        name: As in `transformer_blocks[1:]`; followed by `-> output` where it goes on to what the graph returns.
        first, last: Numbers of its first block in the chain, and of the first behind it.
        decided_by: What a step is decided by: "diff" (the residual diff of the probe), "ratios" (magnitude_ratios),
            "decider" or "mask". There is a probe only with "diff".
        probe: The probe, in words.
        cached: What a reused step supplies.
        state_bytes: What a session keeps of it at these shapes: what was looked at, and all of `cached`.
        cost: Of its nodes: what a reused step saves, but for adding what is kept.
        threshold: `residual_diff_threshold` here.
        reaches_output: It ends where the graph does, and takes in what is before it as far as nothing else reads that.
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


@dataclass(frozen=True, slots=True)
class PieceReport:
    """One graph that the inner backend compiles.

    Attributes:
        number: From 0.
        blocks: Numbers of the blocks that share it; empty for what lies around the blocks.
        segments: Where it is called: "head", "compute_0", "reuse_0", "tail"; each once.
        num_nodes: Its nodes, placeholders and output included.
        cost: Of one call.
    """

    number: int
    blocks: tuple[int, ...]
    segments: tuple[str, ...]
    num_nodes: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class BreakReport:
    """Where Dynamo ended a graph before the model's end.

    Attributes:
        reason: Dynamo's.
        where: `file.py:line` of the user's code, and
        line: that line.
    """

    reason: str
    where: str
    line: str


@dataclass(frozen=True, slots=True)
class RiskReport:
    """What a graph was specialised on: another value compiles once more, up to Dynamo's `recompile_limit`.

    Attributes:
        what: The argument, as in "hidden_states" or "joint_attention_kwargs['scale']".
        found: What it was.
        consequence: What happens with another one.
    """

    what: str
    found: str
    consequence: str


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph that Dynamo made of one transformer.

    Attributes:
        module: Name of the transformer in the pipeline; empty where a transformer was explained itself.
        cls: Its class.
        number: Of the graph, from 0; a transformer that Dynamo breaks up has several.
        is_cached: Whether it gets a conditional.
        num_nodes: Nodes as captured, weights and inputs included.
        arguments: What the caller passes, weights left out.
        cost: Of the whole graph.
        is_estimated: The costs are estimates from shapes: the operations could not be run on fake tensors.
        lists: Lists of blocks that were found, in execution order.
        blocks: Those of the chain, in execution order.
        verdicts: Why it is not cached, nearest miss first; of a cached graph, why the templates tried before did not
            fit.
        regions, pieces: Empty where it is not cached.
        timestep, conditioning: Names of the inputs that tell where in which generation a call stands; empty where
            there is none.
        saved_flops: Share of the graph's FLOPs that a step with every region reused does not do, 0 to 1.
        state_bytes: What a session keeps at these shapes.
        break_after: Why the graph ends before the model does; None where it is the last.
        risks: What it was specialised on.
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
    pieces: tuple[PieceReport, ...] = ()
    timestep: str = ""
    conditioning: str = ""
    saved_flops: float = 0.0
    state_bytes: int = 0
    break_after: BreakReport | None = None
    risks: tuple[RiskReport, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Captured:
    """How one transformer was captured.

    Attributes:
        module: Its name in the pipeline; empty where it was explained itself.
        cls: Its class.
        how: "whole", "whole, sizes that depend on data captured" or "in parts".
        why: What Dynamo met where it could not be captured whole.
        cure: What makes it whole, where none of its parts is cached.
        config: The fields of its `CacheConfig` that were given or are not the default (`CacheConfig.shown_changes`).
    """

    module: str
    cls: str
    how: str
    why: str
    cure: str
    config: dict[str, Any]
