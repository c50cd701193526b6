"""Holds a template against one's own model, numerically: `check_pattern`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError, PatternError, cut, shown
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.frontend.capture_strategies import CaptureStrategies
from cachedit_fx.frontend.enabled import enabled_of
from cachedit_fx.inspect.explanation.data import GraphReport
from cachedit_fx.inspect.explanation.dynamo_recorder import isolated
from cachedit_fx.inspect.explanation.explain import explain
from cachedit_fx.integrations.block_adapter import BlockAdapter
from cachedit_fx.patterns.blocks import HIDDEN
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.forward_pattern import ForwardPattern
from cachedit_fx.patterns.mismatch import labelled_lines
from cachedit_fx.patterns.template import BlockTemplate
from cachedit_fx.runtime.instances import records_of
from cachedit_fx.runtime.request import session
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.testing.template_reference import Call, TemplateReference, UncheckableError, require, tensors_of

__all__ = ["PatternCheck", "UncheckableError", "check_pattern"]

_ROUNDING = 1e-3  # Relative L2 up to which a reference replays a step; of coarser dtypes 16 times their eps.


@dataclass(frozen=True, slots=True)
class PatternCheck:
    """What `check_pattern` verified.

    Attributes:
        region: The blocks that a reused step skips, as in `layers[1:6]`.
        num_blocks: Of the chain.
        decisions: Why each step was computed or reused, as in `CacheStats.decisions`; step 1 is the reused one.
        difference: Largest absolute difference between the reused step's output and the reference's.
        distance: How far the reused step's output is from a computed one's: relative L2, dimensionless, above 0.
        diff: The relative L1 change of `hidden_states` that was measured at step 1; None where nothing was probed.
    """

    template: BlockTemplate
    region: str
    num_blocks: int
    decisions: tuple[str, ...]
    difference: float
    distance: float
    diff: float | None

    def __str__(self) -> str:
        computed = ", ".join(str(i) for i in range(len(self.decisions)) if i != 1)
        how = "bitwise" if not self.difference else f"within {self.difference:.2g}"
        probed = "" if self.diff is None else f"\n  the probe is hidden_states: it moved by {self.diff:.3f} at step 1"
        return (
            f"{self.template} is right: {self.num_blocks} blocks, of which a reused step skips {self.region}\n"
            f"  computed (step {computed}): what the model returns by itself, bitwise\n"
            f"  reused (step 1): what the reference returns, {how}; a computed step is {self.distance:.1%} away{probed}"
        )


def check_pattern(
    template: BlockTemplate,
    module: nn.Module,
    inputs: Call | Sequence[Call],
    *,
    Fn_compute_blocks: int = 1,
    Bn_compute_blocks: int = 0,
    tolerance: float = 0.0,
) -> PatternCheck:
    """Verifies that caching by `template`, and by no other, does to a model what the template says.

    The model is compiled with an eager inner backend and called three times: computed, reused, computed. A computed
    step has to return bitwise what the model does. A reused step is held against a reference that knows no graph: it
    runs the model eagerly, stands in for the calls of the blocks between Fn and Bn, and hands on what entered there
    plus what was added at step 0 (or, for a role that is `cached` as "value", what left at step 0).

    The reference puts streams where the template says: into the argument of the name that `streams` gives (else of
    the role's own name, else at its position in `takes`), and into the result at its position in `returns`. On the
    way it sees which value goes into which argument of the next block, and holds `takes` and `returns` against that.

    It works on a copy in eval mode that shares the weights, so that the module, its sessions and what is compiled of it
    stay as they are.

    What it does not follow it refuses: blocks that take or return streams inside of dicts, lists or dataclasses; lists
    that take turns; blocks between which a stream changes its shape; a loop that keeps streams of its own, as in
    `x = x + block(norm(x))`, or that sums something else up. Other work between blocks (`x = block(x) + control[i]`)
    is a part of the block before it.

    Args:
        template: A user's own (it need not be registered) or a built-in one.
        module: Any size; it is called about ten times. Its weights must not be zero where blocks add to a stream.
        inputs: Keyword arguments of one call: latents, timesteps and what else; two more calls are made of it, of
            earlier timesteps and with floating inputs, but for the conditioning, changed by a tenth. Or two calls or
            more of one generation: the same prompt (as object), other timesteps. All but the second are computed.
        Fn_compute_blocks, Bn_compute_blocks: As in `CacheConfig`.
        tolerance: Largest absolute difference from the reference that is allowed to a reused step. 0 (bitwise) suits
            every model whose streams keep their memory layout.

    Raises:
        AssertionError: The template is wrong for this model; says what was expected and found, where, and what to do.
        UncheckableError: Nothing can be told.
        ConfigError: An argument is of a wrong kind.
    """
    kind: Any = template
    if not isinstance(kind, BlockTemplate):
        hint = f"; give {kind}.value" if isinstance(kind, ForwardPattern) else ""
        raise ConfigError(f"cachedit_fx: template must be a BlockTemplate, got {shown(kind)}{hint}")
    given = [inputs] if isinstance(inputs, Mapping) else [*inputs]
    if not given or not all(isinstance(call, Mapping) for call in given):
        raise ConfigError(
            "cachedit_fx: inputs must be the keyword arguments of a call, as a dict, or a list of such, got "
            f"{shown(inputs)}"
        )
    config = CacheConfig(
        Fn_compute_blocks=Fn_compute_blocks,
        Bn_compute_blocks=Bn_compute_blocks,
        max_warmup_steps=1,
        max_cached_steps=1,
        forecaster=None,
        inner_backend="eager",
        steps_computation_mask=None if Fn_compute_blocks else (1, 0, 1),
        steps_computation_policy="dynamic" if Fn_compute_blocks else "static",
    )
    with torch.no_grad():
        plain = _copy(module)
        graph = _matched_graph(template, plain, given[0], config)
        calls = given if len(given) > 1 else _later_calls(given[0], graph)
        reference = TemplateReference(
            template, plain, [block.path for block in graph.blocks], Fn_compute_blocks, Bn_compute_blocks
        )
        return _compare(reference, calls, config, graph, tolerance)


def _compare(
    reference: TemplateReference, calls: Sequence[Call], config: CacheConfig, graph: GraphReport, tolerance: float
) -> PatternCheck:
    """Runs the model by itself, by the reference and compiled."""
    model, template = reference.model, reference.template
    alone = [tensors_of(model(**call)) for call in calls]
    require(all(bool(t.isfinite().all()) for output in alone for t in output), "the model returns NaN or infinity")
    require(not _apart(alone[0], tensors_of(model(**calls[0]))), "the model is not deterministic: two calls differ")
    reference.run(calls[0], reuse=False)
    again = _distance(reference.run(calls[0], reuse=True), alone[0])
    require(
        again <= max(_ROUNDING, *(16 * torch.finfo(t.dtype).eps for t in alone[0] if t.is_floating_point())),
        f"on the inputs of step 0 its reference returns something else than the model, {again:.1%} away, so more runs "
        "from block to block than the streams of the template",
    )
    expected = reference.run(calls[1], reuse=True)
    distance = _distance(expected, alone[1])
    require(
        distance > 0,
        "a reused step returns what a computed one does, so nothing can be seen; are gates, or the output projection, "
        "zero? Give them values, or give calls that differ in more",
    )
    moved = reference.moved
    if moved is not None and config.Fn_compute_blocks:
        # Any threshold that the diff is below of; from 1 on the conditional would not look.
        config = config.override(residual_diff_threshold=(1 + moved) / 2 if moved < 1 else 1.0)
    outputs, stats = _run_compiled(model, template, calls, config)
    _check_decisions(template, stats, moved)
    for i, (found, computed) in enumerate(zip(outputs, alone, strict=True)):
        if i != 1 and _apart(found, computed):
            raise AssertionError(
                f"cachedit_fx: {template}: step {i}, which is computed, is not what the model returns by itself.\n"
                f"  expected: the same bits\n  found:    {_apart(found, computed)}\n"
                "What to do: this is a defect of cachedit_fx, please report it with the model."
            )
    difference = _largest(outputs[1], expected)
    if not difference <= tolerance:
        raise AssertionError(_reused_differs(reference, graph, outputs[1], expected))
    diff = stats.residual_diffs.get(1)
    return PatternCheck(
        template, graph.regions[0].name, len(reference.blocks), tuple(stats.decisions), difference, distance, diff
    )


def _reused_differs(
    reference: TemplateReference, graph: GraphReport, found: list[Tensor], expected: list[Tensor]
) -> str:
    template, region = reference.template, graph.regions[0]
    cached = {cached.value.role: cached.cached_as for cached in region.cached}
    beside = [role for role in cached if role not in template.streams_out]
    require(
        len(beside) <= len(template.emitted),
        f"the loop makes more of what the blocks return than the streams, and uses it after them: {', '.join(beside)}",
    )
    streams = []
    for role in template.streams_out:
        want = template.cached.get(role, "residual")
        if cached.get(role) != want:
            streams.append(f"  stream {role}: expected to be kept as {want}, found {cached.get(role, 'not kept')}")
    first, last = reference.blocks[reference.fn][0], reference.blocks[reference.stop - 1][0]
    lines = [
        f"cachedit_fx: {template}: step 1, which is reused, is not what the template says.",
        f"  expected: {first} to {last} skipped, and per stream what entered {first} and what they added before",
        f"  found:    {_apart(found, expected)}",
        *streams,
        f"The graph keeps {', '.join(f'{role} as {how}' for role, how in cached.items())}.",
        "What to do: a difference of rounding (see tolerance=) is none of the template; else correct takes, returns, "
        "streams and cached by what cachedit_fx.explain(model, **inputs) shows of the blocks.",
    ]
    return "\n".join(lines)


def _check_decisions(template: BlockTemplate, stats: CacheStats, moved: float | None) -> None:
    diff = stats.residual_diffs.get(1)
    # The same sums over the same values, in an order of their own: 1e-3 is far above the rounding of float32.
    if diff is not None and moved is not None and abs(diff - moved) > 1e-3 * max(moved, 1e-3):
        raise AssertionError(
            f"cachedit_fx: {template}: the graph's probe is another stream than the template's {HIDDEN}.\n"
            f"  expected: a change of {moved:.4f} between step 0 and step 1, that of {HIDDEN} as the blocks take it\n"
            f"  found:    {diff:.4f}\n"
            f"What to do: name {HIDDEN} in streams={{...}} as the code of the blocks does."
        )
    require(
        1 in stats.cached_steps,
        f"step 1 was not reused ({stats.decisions[1]}); give calls of one generation, with timesteps that move, "
        "as tensors, and a prompt that is the same object",
    )


def _run_compiled(
    model: nn.Module, template: BlockTemplate, calls: Sequence[Call], config: CacheConfig
) -> tuple[list[list[Tensor]], CacheStats]:
    backend = Backend(config, declared=Declaration(patterns=(template,)))
    compiled = CaptureStrategies(model, backend, isolated())
    with session("check_pattern"):
        outputs = [tensors_of(compiled(**call)) for call in calls]
    found = [stats for record in records_of(model, every_generation=True) for stats in record.stats]
    require(
        len(found) == 1 and found[0].num_steps == len(calls),
        f"its {len(calls)} calls were taken for {len(found)} generations; give the same prompt, as the same object, to "
        "all of them, and timesteps that move in one direction",
    )
    return outputs, found[0]


def _matched_graph(template: BlockTemplate, model: nn.Module, call: Call, config: CacheConfig) -> GraphReport:
    """The one graph that is cached by the template.

    Raises:
        AssertionError: There is none.
    """
    adapter = BlockAdapter(transformer=model, forward_pattern=template, auto=True)
    see = "See what each block takes and returns: print(cachedit_fx.explain(model, **inputs))"
    head = f"cachedit_fx: {template} does not fit {type(model).__name__}, so nothing of it would be cached by it."
    try:
        explanation = explain(adapter, cache_config=config, **call)
    except PatternError as error:
        if error.mismatch is None:
            raise
        mismatch = error.mismatch
        lines = [
            f"  {mismatch.cause.value}:",
            *mismatch.lines,
            f"What to do: {mismatch.cure}.",
            f"{error.fits}.",
            see,
        ]
        raise AssertionError("\n".join((head, *lines))) from None
    cached = [graph for graph in explanation.graphs if graph.is_cached]
    if not cached:
        graph = max(explanation.graphs, key=lambda graph: graph.num_nodes, default=None)
        verdicts = graph.verdicts[:1] if graph is not None else ()
        lines = []
        for verdict in verdicts:
            texts = {"expected": verdict.expected, "found": verdict.found, "at": verdict.where}
            lines = [f"  {verdict.cause}:", *labelled_lines(texts)]
            lines.append(f"What to do: {verdict.cure}.")
        raise AssertionError("\n".join((head, *lines, see)))
    graph, total = cached[0], len(cached[0].blocks)
    ends = [(region.first, region.last) for region in graph.regions]
    whole = [(config.Fn_compute_blocks, total - config.Bn_compute_blocks)]
    paths = ", ".join(found.path for found in graph.lists if found.in_chain)
    require(ends == whole, f"the blocks at {paths} are cut into {len(ends)} regions; it follows a single one")
    turns = [" and ".join((x.path, *x.alternates)) for x in graph.lists if x.in_chain and x.alternates]
    require(not turns, f"the lists {', '.join(turns)} take turns; it follows blocks that are one module each")
    return graph


def _copy(module: nn.Module) -> nn.Module:
    """The module with all that it holds, but for the memory of its weights; neither compiled nor in training mode."""
    module = getattr(module, "_orig_mod", module)
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in module.parameters()
    }
    enabled = enabled_of(module)
    if enabled is not None:
        memo[id(enabled)] = None  # The copy would be enabled as well.
    try:
        copied = copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise UncheckableError(
            f"cachedit_fx: check_pattern cannot tell: it works on a copy, and this {type(module).__name__} cannot be "
            f"copied ({type(error).__name__}: {cut(error)}).\n"
            "What to do: take out of it what copy.deepcopy does not copy."
        ) from error
    if enabled is not None:
        copied.__dict__.pop(enabled.place, None)
    return copied


def _later_calls(first: Call, graph: GraphReport) -> list[Call]:
    """The call, and two more of its generation: the prompt stays, time moves, and all else that is floating too."""
    generator, calls = torch.Generator().manual_seed(0), [first]
    for i in (1, 2):
        call = dict(first)
        for name, value in first.items():
            if name == graph.timestep:
                call[name] = _earlier(value, i)
            elif isinstance(value, Tensor) and value.is_floating_point() and name != graph.conditioning:
                call[name] = value * (1 + 0.1 * torch.randn(value.shape, generator=generator).to(value))
        calls.append(call)
    return calls


def _earlier(timestep: Any, by: int) -> Any:
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        return timestep - by if int(torch.as_tensor(timestep).min()) > by else timestep + by
    return timestep * (1 - 0.1 * by) if bool(torch.as_tensor(timestep).any()) else timestep + 0.1 * by


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """How two outputs differ, in words; empty if they have the same bits."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"tensors of shapes {[[*t.shape] for t in found]}, not {[[*t.shape] for t in expected]}"
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, other):
            return f"tensor {i} of the output differs by up to {_largest([one], [other]):.3g}"
    return ""


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    pairs = zip(found, expected, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected|, over all tensors."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return float((apart / size) ** 0.5) if size else 0.0
