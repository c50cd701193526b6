"""Everything that is decided after the plan and before the pieces are compiled: what the runtime needs of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, Changes
from cachedit_fx.passes.analysis.cached_examples import cached_examples
from cachedit_fx.passes.analysis.dataflow import is_weight
from cachedit_fx.passes.analysis.effects import effect_of
from cachedit_fx.passes.analysis.module_calls import module_path_of
from cachedit_fx.passes.analysis.size_rule import Size, SizeRule, UnknownSizeError
from cachedit_fx.passes.analysis.writes import written_outside
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Region
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch, MismatchError
from cachedit_fx.patterns.nodes import call_text, is_tensor, source_line, value_of

NUM_CHECKSUMS = 2  # Of a conditioning that can be written in place without a change of its version.

PartialSizes = tuple[Size | None, ...]


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What the runtime needs of a region.

    Attributes:
        overrides: The fields of the configuration that this region sets itself.
        has_probe: Whether the conditional has a probe. It is then the first entry of `sizes`, `dtypes` and `devices`.
        measured: For each of `dtypes`, whether its size depends on data. `sizes` leaves it out; a step measures it.
        roles: The roles of the live-outs, in order.
        groups: The names of the process groups whose ranks must decide alike (see `Region`).
    """

    name: str
    overrides: Changes | None
    has_probe: bool
    sizes: SizeRule
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    measured: tuple[bool, ...] = ()
    roles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def sizes_at(self, args: Sequence[Any] | Mapping[int, Any], streams: Sequence[torch.Tensor] = ()) -> PartialSizes:
        """Shapes and strides of everything that is cached at a call; None for what has not been measured yet."""
        sizes = self.sizes(args)
        if not any(self.measured):
            return sizes
        known, found = iter(sizes), iter(streams)
        return tuple(_size_of(next(found, None)) if is_measured else next(known) for is_measured in self.measured)


def _size_of(stream: torch.Tensor | None) -> Size | None:
    if stream is None:
        return None
    return tuple(stream.shape), torch.empty_like(stream, device="meta").stride()


@dataclass(frozen=True, slots=True)
class RuntimePlan:
    """What the runtime needs of a graph, besides its compiled pieces. Positions are those of the graph's arguments.

    Attributes:
        regions: In the order of the conditionals.
        weights: One weight of every block, by which module instances are told apart: its position, or the tensor itself
            if the graph holds it.
        conditioning: Position of the argument whose identity distinguishes requests and guidance branches.
        has_timestep: Whether the graph is given a timestep. The first probe vector then contains it.
        num_checksums: How many checksums of the conditioning are at the end of the first probe vector: `NUM_CHECKSUMS`,
            or 0 if the version of the conditioning shows whether it was written in place.
        region_paths: Paths of the modules that run only inside the regions.
        region_key: Equal for graphs whose regions run the same operations on values of the same names. Such graphs
            share their cached values.
        effect: What the graph does besides computing its outputs, as a clause; empty if there is nothing.
    """

    regions: tuple[RegionPlan, ...]
    weights: tuple[int | torch.Tensor, ...]
    conditioning: int | None
    has_timestep: bool
    num_checksums: int
    region_paths: tuple[str, ...]
    region_key: int
    effect: str


def make_runtime_plan(plan: Plan, config: CacheConfig) -> RuntimePlan:
    """What the runtime needs of the graph that `plan` is for.

    Raises:
        MismatchError: A size depends on data in a way that no call can check, or the graph cannot run twice on its
            inputs although `config.shadow` requires it.
    """
    placeholders = [node for node in plan.program.nodes if node.op == "placeholder"]
    try:
        regions = tuple(_region_plan(region, placeholders) for region in plan.regions)
    except UnknownSizeError as error:
        expected = "streams whose sizes follow from those of the inputs"
        found = f"a size ({error.symbols}) that depends on data"
        raise MismatchError(Mismatch(None, Cause.DYNAMIC, expected, found)) from error
    if config.shadow:
        _check_runs_twice(plan)
    return RuntimePlan(
        regions=regions,
        weights=_weights_of_blocks(plan, placeholders),
        conditioning=placeholders.index(plan.conditioning) if plan.conditioning is not None else None,
        has_timestep=plan.timestep is not None,
        num_checksums=NUM_CHECKSUMS if plan.conditioning is not None and _has_no_version(plan.conditioning) else 0,
        region_paths=tuple(_paths_of_regions(plan)),
        region_key=_key_of_regions(plan),
        effect=effect_of(plan.program),
    )


def _region_plan(region: Region, placeholders: Sequence[fx.Node]) -> RegionPlan:
    examples = cached_examples(region)
    measured = (*[False] * (region.probed_at is not None), *(pair.is_measured for pair in region.live_outs))
    return RegionPlan(
        name=region.name,
        overrides=region.overrides,
        has_probe=region.probed_at is not None,
        sizes=SizeRule([t for t, is_measured in zip(examples, measured, strict=True) if not is_measured], placeholders),
        measured=measured,
        dtypes=tuple(tensor.dtype for tensor in examples),
        devices=tuple(tensor.device for tensor in examples),
        roles=tuple(pair.role for pair in region.live_outs),
        groups=tuple(group.name for group in region.groups),
    )


def _check_runs_twice(plan: Plan) -> None:
    written = written_outside(plan.program, [*plan.program.nodes_in(0, len(plan.program.nodes))])
    if written is not None:
        expected = "a graph that may run twice on the same inputs (shadow=True)"
        found, where = f"`{call_text(written)}`", source_line(written)
        raise MismatchError(Mismatch(None, Cause.IN_PLACE, expected, found, node=written.name, where=where))


def _has_no_version(conditioning: fx.Node) -> bool:
    """Whether writing to the conditioning in place does not increase a version, because it is an inference tensor."""
    if not is_tensor(conditioning):
        return False
    example = conditioning.meta.get("cachedit_example", value_of(conditioning))
    return torch.is_inference_mode_enabled() or bool(example.is_inference())


def _weights_of_blocks(plan: Plan, placeholders: Sequence[fx.Node]) -> tuple[int | torch.Tensor, ...]:
    """The first weight of every block, as in `RuntimePlan.weights`.

    Buffers count as weights, because the weights of quantized layers are often buffers.
    """
    nodes = plan.program.nodes
    blocks = [block for match in plan.chain for block in match.blocks.blocks]
    found = [_first_weight(plan, nodes[block.start : block.end]) for block in blocks]
    known = [weight for weight in found if weight is not None]
    if not known:
        return (torch.empty(0),)  # All instances of a chain without weights count as one.
    return tuple(w if isinstance(w, torch.Tensor) else placeholders.index(w) for w in known)


def _first_weight(plan: Plan, nodes: Sequence[fx.Node]) -> fx.Node | torch.Tensor | None:
    """The first parameter that `nodes` read. Otherwise the first other tensor that the model holds.

    A module can also hold tensors in other objects, where nothing finds them that starts from the module.
    """
    other: fx.Node | torch.Tensor | None = None
    for arg in (arg for node in nodes for arg in node.all_input_nodes):
        # The numbers that a module holds are tensors without dimensions, which are created at every call.
        if arg.op == "placeholder" and is_tensor(arg) and is_weight(arg) and value_of(arg).dim():
            if isinstance(arg.meta.get("cachedit_example"), torch.nn.Parameter):
                return arg
            other = arg if other is None else other
        held = getattr(plan.gm, str(arg.target), None) if arg.op == "get_attr" else None
        if isinstance(held, torch.Tensor):
            other = held if other is None else other
    return other


def _paths_of_regions(plan: Plan) -> list[str]:
    """Paths of the blocks of which no part runs before their region."""
    blocks = [(match.blocks, block) for match in plan.chain for block in match.blocks.blocks]
    hoisted = {node.meta.get("cachedit_block") for region in plan.regions for node in region.hoisted}
    # Layout operations at the beginning of the first block of a list may run before it.
    firsts = [(i, block) for i, (of, block) in enumerate(blocks) if block is of.blocks[0] and block.start]
    before = {i: plan.program.nodes[block.start - 1] for i, block in firsts}
    hoisted |= {i for i, node in before.items() if ".".join(module_path_of(node)) == blocks[i][1].path}
    numbers = [i for region in plan.regions for i in range(region.first, region.last) if i not in hoisted]
    found = []
    for of, block in (blocks[i] for i in numbers):
        # If lists alternate, a block consists of one module of each list, at the same place in its list.
        place = block.path.removeprefix(of.path)
        found += [block.path, *(other + place for other in of.alternates)]
    return found


def _key_of_regions(plan: Plan) -> int:
    nodes = (node for region in plan.regions for node in region.nodes)
    return hash(tuple((node.op, str(node.target), str(node.args), str(node.kwargs)) for node in nodes))
