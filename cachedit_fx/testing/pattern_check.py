"""Compares caching by a block template with an eager reference on a user's own model: `check_pattern`."""

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

# Largest relative L2 distance at which a replayed step counts as equal; for coarser dtypes, 16 times their eps.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class PatternCheck:
    """The result of a successful `check_pattern`.

    Attributes:
        template: The template that was checked.
        region: The blocks that a reused step skips, such as `layers[1:6]`.
        num_blocks: The number of blocks in the chain.
        decisions: Why each step was computed or reused, as in `CacheStats.decisions`. Step 1 is the reused step.
        difference: The largest absolute difference between the output of the reused step and the reference.
        distance: The relative L2 distance between the outputs of the reused step and of a computed step;
            dimensionless, greater than 0.
        diff: The relative L1 change of `hidden_states` that was measured at step 1; None if there is no probe.
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
        probed = (
            "" if self.diff is None else f"\n  probe: hidden_states, whose residual diff at step 1 was {self.diff:.3f}"
        )
        return (
            f"{self.template} is correct: {self.num_blocks} blocks, of which a reused step skips {self.region}\n"
            f"  computed (step {computed}): equal to the model without the cache, bitwise\n"
            f"  reused (step 1): equal to the reference, {how}; {self.distance:.1%} away from a computed step{probed}"
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
    """Verifies that caching a model by `template`, and by no other template, does what the template declares.

    The model is compiled with an eager inner backend and called three times: computed, reused, computed. A computed
    step must return bitwise what the model returns without the cache. A reused step is compared with a reference that
    uses no graph. The reference runs the model eagerly and replaces the calls of the blocks between Fn and Bn. In
    their place, it returns the stream that entered them plus what they added at step 0 (for a role that is `cached` as
    "value": the stream that left them at step 0).

    The reference passes each stream as the argument that `streams` names. Without an entry there, it uses the argument
    that has the name of the role, or else the position in `takes`. It returns each stream at its position in
    `returns`. While the model runs, it also observes which returned value becomes which argument of the next block,
    and compares `takes` and `returns` with that.

    The check works on a copy of the module in eval mode that shares the weights. The module itself, its sessions and
    its compiled code do not change.

    The following models cannot be checked: blocks that take or return streams inside dicts, lists or dataclasses;
    block lists that are called alternately; blocks between which a stream changes its shape; a loop that holds a
    stream of its own, as in `x = x + block(norm(x))`, or that sums up something else. Other work between two blocks
    (`x = block(x) + control[i]`) counts as part of the block before it.

    Args:
        template: The user's own template (it need not be registered) or a built-in one.
        module: A model of any size. It is called about ten times. Where its blocks add to a stream, its weights must
            not be zero.
        inputs: The keyword arguments of one call (latents, timestep and so on). Two further calls are derived from
            it: they have earlier timesteps, and their floating-point inputs, except the conditioning, are changed by
            a tenth. Alternatively, two or more calls of one generation, with the same prompt object and different
            timesteps. All of them except the second are computed.
        Fn_compute_blocks: As in `CacheConfig`.
        Bn_compute_blocks: As in `CacheConfig`.
        tolerance: The largest absolute difference from the reference that is allowed for a reused step. 0 (bitwise)
            suits every model whose streams do not change their memory layout.

    Returns:
        What was verified. Its `str` summarizes it.

    Raises:
        AssertionError: The template is wrong for this model. The message states what was expected, what was found,
            where, and what to do.
        UncheckableError: The model or its inputs cannot be checked.
        ConfigError: An argument has a wrong type.
    """
    kind: Any = template
    if not isinstance(kind, BlockTemplate):
        hint = f"; give {kind}.value" if isinstance(kind, ForwardPattern) else ""
        raise ConfigError(f"cachedit_fx: template must be a BlockTemplate, got {shown(kind)}{hint}")
    given = [inputs] if isinstance(inputs, Mapping) else [*inputs]
    if not given or not all(isinstance(call, Mapping) for call in given):
        raise ConfigError(
            "cachedit_fx: inputs must be the keyword arguments of a call, as a dict, or a list of such dicts, got "
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
    """Runs the model without the cache, with the reference, and compiled, and compares the outputs."""
    model, template = reference.model, reference.template
    uncached = [tensors_of(model(**call)) for call in calls]
    require(all(bool(t.isfinite().all()) for output in uncached for t in output), "the model returns NaN or infinity")
    require(
        not _difference(uncached[0], tensors_of(model(**calls[0]))),
        "the model is not deterministic: two calls with the same inputs differ",
    )
    reference.run(calls[0], reuse=False)
    replayed = _distance(reference.run(calls[0], reuse=True), uncached[0])
    require(
        replayed <= max(_ROUNDING, *(16 * torch.finfo(t.dtype).eps for t in uncached[0] if t.is_floating_point())),
        f"on the inputs of step 0, the output of the reference is {replayed:.1%} away from that of the model, so the "
        "blocks pass more to each other than the streams of the template",
    )
    expected = reference.run(calls[1], reuse=True)
    distance = _distance(expected, uncached[1])
    require(
        distance > 0,
        "a reused step returns the same as a computed one, so a wrong template would not show; are the gates or the "
        "output projection zero? Initialize them, or pass calls that differ more",
    )
    moved = reference.moved
    if moved is not None and config.Fn_compute_blocks:
        # The diff has to be below the threshold; from 1 on, the decision would not depend on the diff.
        config = config.override(residual_diff_threshold=(1 + moved) / 2 if moved < 1 else 1.0)
    outputs, stats = _run_compiled(model, template, calls, config)
    _check_decisions(template, stats, moved)
    for i, (found, computed) in enumerate(zip(outputs, uncached, strict=True)):
        if i != 1 and _difference(found, computed):
            raise AssertionError(
                f"cachedit_fx: {template}: step {i}, which is computed, differs from the model without the cache.\n"
                f"  expected: bitwise equal outputs\n  found:    {_difference(found, computed)}\n"
                "What to do: this is a bug in cachedit_fx; please report it with the model."
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
    extra = [role for role in cached if role not in template.streams_out]
    require(
        len(extra) <= len(template.emitted),
        "the loop derives more than the streams from what the blocks return, and uses it after the blocks: "
        f"{', '.join(extra)}",
    )
    streams = []
    for role in template.streams_out:
        want = template.cached.get(role, "residual")
        if cached.get(role) != want:
            streams.append(f"  stream {role}: expected to be cached as {want}, found {cached.get(role, 'not cached')}")
    first, last = reference.blocks[reference.fn][0], reference.blocks[reference.stop - 1][0]
    lines = [
        f"cachedit_fx: {template}: step 1, which is reused, differs from what the template declares.",
        f"  expected: {first} to {last} skipped; each stream is what entered {first} plus what they added at step 0",
        f"  found:    {_difference(found, expected)}",
        *streams,
        f"The graph caches {', '.join(f'{role} as {how}' for role, how in cached.items())}.",
        "What to do: if the difference is rounding, the template is correct; pass tolerance=.\n"
        "Otherwise, correct takes, returns, streams and cached: cachedit_fx.explain(model, **inputs) shows the blocks.",
    ]
    return "\n".join(lines)


def _check_decisions(template: BlockTemplate, stats: CacheStats, moved: float | None) -> None:
    diff = stats.residual_diffs.get(1)
    # Both are sums over the same values in different orders; 1e-3 is far above the rounding of float32.
    if diff is not None and moved is not None and abs(diff - moved) > 1e-3 * max(moved, 1e-3):
        raise AssertionError(
            f"cachedit_fx: {template}: the probe of the graph is another stream than the template's {HIDDEN}.\n"
            f"  expected: a change of {moved:.4f} between step 0 and step 1, that of {HIDDEN} as the blocks take it\n"
            f"  found:    {diff:.4f}\n"
            f"What to do: in streams={{...}}, give {HIDDEN} the name that it has in the code of the blocks."
        )
    require(
        1 in stats.cached_steps,
        f"step 1 was not reused ({stats.decisions[1]}); pass calls of one generation: their timesteps must be tensors "
        "and must differ, and their prompt must be the same object",
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
        f"the {len(calls)} calls were taken for {len(found)} generations; pass the same prompt object to all of them, "
        "and timesteps that change in one direction",
    )
    return outputs, found[0]


def _matched_graph(template: BlockTemplate, model: nn.Module, call: Call, config: CacheConfig) -> GraphReport:
    """Returns the one graph that is cached by the template.

    Raises:
        AssertionError: There is none.
    """
    adapter = BlockAdapter(transformer=model, forward_pattern=template, auto=True)
    see = "See what each block takes and returns: print(cachedit_fx.explain(model, **inputs))"
    head = f"cachedit_fx: {template} does not fit {type(model).__name__}, so it would cache nothing of this model."
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
    require(ends == whole, f"the blocks at {paths} are cut into {len(ends)} regions; only one region can be checked")
    turns = [" and ".join((x.path, *x.alternates)) for x in graph.lists if x.in_chain and x.alternates]
    require(
        not turns,
        f"the lists {', '.join(turns)} are called alternately; only blocks that are one module each can be checked",
    )
    return graph


def _copy(module: nn.Module) -> nn.Module:
    """Copies a module. The copy shares the memory of the weights, is not compiled, and is in eval mode."""
    module = getattr(module, "_orig_mod", module)
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in module.parameters()
    }
    enabled = enabled_of(module)
    if enabled is not None:
        memo[id(enabled)] = None  # Otherwise, the copy would be enabled as well.
    try:
        copied = copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise UncheckableError(
            f"cachedit_fx: check_pattern cannot check this model: it works on a copy, and this {type(module).__name__} "
            f"cannot be copied ({type(error).__name__}: {cut(error)}).\n"
            "What to do: remove what copy.deepcopy does not copy from the module."
        ) from error
    if enabled is not None:
        copied.__dict__.pop(enabled.place, None)
    return copied


def _later_calls(first: Call, graph: GraphReport) -> list[Call]:
    """Returns the call and two later ones of its generation.

    The prompt stays the same; the timestep and all other floating-point inputs change.
    """
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


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Describes how two outputs differ; empty if they are bitwise equal."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"tensors of shapes {[[*t.shape] for t in found]}, not {[[*t.shape] for t in expected]}"
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, other):
            return f"tensor {i} of the output differs by up to {_largest([one], [other]):.3g}"
    return ""


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest absolute difference, computed in float64."""
    pairs = zip(found, expected, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the relative L2 distance |found - expected| / |expected| over all tensors, computed in float64."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return float((apart / size) ** 0.5) if size else 0.0
