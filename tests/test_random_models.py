"""Random transformers: each gives the outputs of a plain-Python reference, or is refused with a reason.

A generation has three steps: computed, reused, computed. `--hypothesis-profile thorough` tries many more models, and
different ones in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.frontend import backend
from cachedit_fx.passes.manager import Rewritten
from cachedit_fx.passes.plan import Plan
from cachedit_fx.patterns import Cause, Mismatch
from cachedit_fx.runtime.step import StepRun
from tests.line_reference import LineReference
from tests.random_models import build, generation, write
from tests.random_specs import END, USUAL, Blocks, Skip, Spec, Work, counts, specs
from tests.regions import relative_l1

DECISIONS = ["warmup", "threshold-one", "max-continuous"]
COMPUTED, REUSED = (0, 2), 1  # Steps of a generation.
MOVED = 1e-2  # A reused step differs by more than this from the computed one it replaces: the latents change.


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Case:
    """A model, and the numbers of its blocks that are always computed."""

    spec: Spec
    fn: int = 1
    bn: int = 0

    def config(self, **fields: Any) -> CacheConfig:
        return CacheConfig(
            Fn_compute_blocks=self.fn,
            Bn_compute_blocks=self.bn,
            max_warmup_steps=1,
            residual_diff_threshold=1.0,
            max_continuous_cached_steps=1,
            forecaster=None,
            inner_backend="eager",
            **fields,
        )

    @property
    def tolerance(self) -> float:
        """The tolerance for a reused step against the reference.

        The package slices a stream out of a joined one before it adds the residual, the reference after it. The inputs
        of the next matrix product then differ in their layout, so it rounds differently.
        """
        if all(blocks.holds != "joint" for blocks in self.spec.lists):
            return 0
        return 0.05 if self.spec.cast == "bfloat16" else 1e-5


@st.composite
def cases(draw: st.DrawFn, **features: frozenset[str]) -> Case:
    spec = draw(specs(**features))
    return Case(spec, *draw(counts(spec)))


@dataclass
class Outcome:
    """The outcome for a model.

    Attributes:
        plan: The result of the passes for its graph.
        outputs, plain: The outputs of each step, of the cached and of the uncached model.
        decisions: The decisions of every region of every session.
        diffs: The diffs that were passed to the policy, whether or not it used them.
    """

    plan: Plan | tuple[Mismatch, ...] = ()
    outputs: list[list[Tensor]] = field(default_factory=list)
    plain: list[list[Tensor]] = field(default_factory=list)
    decisions: list[list[str]] = field(default_factory=list)
    diffs: list[float] = field(default_factory=list)

    @property
    def chain(self) -> list[str]:
        """Paths of the blocks in execution order."""
        assert isinstance(self.plan, Plan)
        return [block.path for match in self.plan.chain for block in match.blocks.blocks]

    @property
    def adds_late(self) -> bool:
        """Whether the text gets a residual; if only a later list of a region reads it, the value may be cached."""
        assert isinstance(self.plan, Plan)
        live_outs = [pair for region in self.plan.regions for pair in region.live_outs]
        return any(pair.role == "encoder_hidden_states" and pair.before is not None for pair in live_outs)


def run(case: Case) -> Outcome:
    """Runs one generation of the uncached model, and one of the compiled model."""
    torch._dynamo.reset()
    cachedit_fx.reset()
    found, model, rewrite, decide = Outcome(), build(write(case.spec)), backend.rewrite, StepRun.decide

    def rewriting(*args: Any, **kwargs: Any) -> Any:
        rewritten = rewrite(*args, **kwargs)
        found.plan = rewritten.plan if isinstance(rewritten, Rewritten) else rewritten
        return rewritten

    def deciding(step: StepRun, region: int, probe_vector: torch.Tensor | None, *streams: Any) -> bool:
        found.diffs.append(float(probe_vector[0]) if probe_vector is not None else math.nan)
        return decide(step, region, probe_vector, *streams)

    def failing(error: Exception, _config: CacheConfig, _what: str) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "rewrite", rewriting)
        patched.setattr(backend, "_report_bug", failing)
        patched.setattr(StepRun, "decide", deciding)
        found.plain = [list(model(**call)) for call in generation(case.spec)]
        compiled = torch.compile(model, backend=cachedit_fx.Backend(case.config()), fullgraph=True)
        found.outputs = [list(compiled(**call)) for call in generation(case.spec)]
    if isinstance(found.plan, Plan):
        records = cachedit_fx.summary(model, every_generation=True, logging=False)
        found.decisions = [entry.decisions for entry in records]
    return found


def check(case: Case) -> Outcome:
    """Compares a model with the reference, or checks the reason why it is not cached."""
    found = run(case)
    if isinstance(found.plan, Plan):
        check_cached(case, found)
    else:
        check_refused(case, found)
    return found


def check_refused(case: Case, found: Outcome) -> None:
    assert isinstance(found.plan, tuple) and all(isinstance(mismatch.cause, Cause) for mismatch in found.plan)
    assert_equal(found.outputs, found.plain)
    torch._dynamo.reset()
    compiled = torch.compile(build(write(case.spec)), backend=cachedit_fx.Backend(case.config(on_no_match="raise")))
    with pytest.raises(BackendCompilerFailed, match=rf"NoMatchError.*\n.* {found.plan[0].cause.value}:\n  "):
        compiled(**next(generation(case.spec)))


def check_cached(case: Case, found: Outcome) -> None:
    assert isinstance(found.plan, Plan)
    image = {blocks.path for blocks in case.spec.image_lists}
    assert {match.blocks.path for match in found.plan.chain} <= image, "the image does not run through the chain"
    assert found.decisions == [DECISIONS] * len(found.plan.regions)
    regions = [(region.first, region.last) for region in found.plan.regions]
    assert len(regions) > 1 or regions == [(case.fn, len(found.chain) - case.bn)]
    code = write(case.spec)
    reference = LineReference(code, build(code), found.chain, regions, adds_late=found.adds_late)
    calls = list(generation(case.spec))
    expected = [reference(call, reuse=step == REUSED) for step, call in enumerate(calls)]
    for step in COMPUTED:
        assert_equal(expected[step], found.plain[step])  # Otherwise the reference is wrong.
        assert_equal(found.outputs[step], found.plain[step])
    assert_equal(found.outputs[REUSED], expected[REUSED], case.tolerance)
    assert (found.outputs[REUSED][0] - found.plain[REUSED][0]).abs().max() > MOVED
    probed_at = [reference.probed_at(call) for call in calls]
    if len(regions) == 1 and probed_at[0] is not None:
        diffs = [relative_l1(now, probed_at[0]) for now in probed_at[1:]]
        # Means over a few hundred elements, summed in float32 in different orders.
        assert found.diffs[1:] == pytest.approx(diffs, rel=1e-4), "something else is looked at"


def assert_equal(found: list[Any], expected: list[Any], tolerance: float = 0) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@given(case=cases())
def test_a_random_model_is_cached_correctly_or_refused_with_a_reason(case: Case):
    found = check(case)
    event("matched" if isinstance(found.plan, Plan) else f"refused: {found.plan[0].cause.value}")


@pytest.mark.slow
@settings(max_examples=20)
@given(case=cases(odd=USUAL))
def test_a_typical_model_is_cached_and_every_cached_value_is_used(case: Case):
    found = check(case)
    is_left = case.fn + case.bn < case.spec.depth
    assert isinstance(found.plan, Plan) or not is_left, str(found.plan[0])
    if is_left:
        code, calls = write(case.spec), list(generation(case.spec))
        regions = [(case.fn, len(found.chain) - case.bn)]
        reference = LineReference(code, build(code), found.chain, regions, adds_late=found.adds_late)
        reference(calls[0])
        (expected, *_) = reference(calls[REUSED], reuse=True)
        assert reference.cached
        for name in reference.cached:
            (without, *_) = reference(calls[REUSED], reuse=True, forget=name)
            assert (without - expected).abs().max() > MOVED, name


TWO = ("hidden_states", "encoder_hidden_states")
SIDE, TEXT = Blocks("blocks", 2, "side"), Blocks("blocks", 2, "text")
# Models of earlier bugs: they were cached incorrectly, or not at all.
FOUND = {
    "a side list as heavy as the chain": Case(Spec(lists=(SIDE, Blocks("single_blocks", 2)))),
    "a side list before the image is embedded": Case(Spec(lists=(SIDE, Blocks("single_blocks", 4)), late=True)),
    "a side list in front of two of the image's": Case(
        Spec(lists=(SIDE, Blocks("single_blocks", 2), Blocks("last_blocks", 2)))
    ),
    "a text list before the image is embedded": Case(
        Spec(names=TWO, lists=(TEXT, Blocks("single_blocks", 6, "joint")), late=True), fn=3, bn=1
    ),
    "an input added behind the first block": Case(
        Spec(lists=(Blocks("blocks", 2),), works=(Work(0, "norm"), Work(0, "control")))
    ),
    "something emitted that is as long as the text": Case(
        Spec(names=TWO, tokens=(5, 5), lists=(Blocks("blocks", 5, "all", body="post-norm", emits="stream"),)), fn=4
    ),
    "a second list with a stream more": Case(
        Spec(names=TWO, lists=(Blocks("blocks", 2), Blocks("single_blocks", 2, "all")), uses_text=True)
    ),
    "a skip from before a norm, added behind the next block": Case(
        Spec(lists=(Blocks("blocks", 5),), works=(Work(2, "norm"),), skips=(Skip(2, 4),)), fn=3
    ),
    "a skip from before a norm, given to the next block": Case(
        Spec(lists=(Blocks("blocks", 5),), works=(Work(2, "norm"),), skips=(Skip(2, 3, "argument"),)), fn=3
    ),
    "a skip that is merged twice": Case(
        Spec(lists=(Blocks("blocks", 5),), skips=(Skip(2, 4, "merge"), Skip(2, 3, "merge"))), fn=3
    ),
    "an input added behind every block": Case(
        Spec(lists=(Blocks("blocks", 2),), works=(Work(0, "control"), Work(1, "control")))
    ),
    "an input added behind each of many blocks": Case(
        Spec(lists=(Blocks("blocks", 4),), works=tuple(Work(after, "control") for after in range(4)))
    ),
    "an adapter behind every block": Case(
        Spec(lists=(Blocks("blocks", 3),), works=tuple(Work(after, "adapter") for after in range(3)))
    ),
    "an adapter behind every block of two lists": Case(
        Spec(
            lists=(Blocks("blocks", 2), Blocks("single_blocks", 2)),
            works=tuple(Work(after, "adapter") for after in range(4)),
        )
    ),
    "an end exactly where two lists are joined": Case(
        Spec(names=TWO, lists=(Blocks("blocks", 4, "all"), Blocks("single_blocks", 4, "joint"))), fn=3, bn=4
    ),
    "a skip of the image with an input added": Case(
        Spec(lists=(Blocks("blocks", 4),), works=(Work(1, "in-place"),), skips=(Skip(1, END),)), fn=1, bn=1
    ),
    "the last stream added to itself": Case(Spec(lists=(Blocks("blocks", 2),), skips=(Skip(1, END),))),
    "what entered the last block added behind it": Case(
        Spec(lists=(Blocks("blocks", 3),), skips=(Skip(1, END),)), fn=2
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_a_model_of_an_earlier_bug_is_cached_correctly(case: Case):
    assert isinstance(check(case).plan, Plan)


def test_joined_streams_of_equal_lengths_are_not_distinguished():
    """The slice at the end could be either of the two streams."""
    spec = Spec(names=TWO, tokens=(5, 5), lists=(Blocks("blocks", 2, "all"), Blocks("single_blocks", 4, "joint")))
    plan = check(Case(spec)).plan
    assert not isinstance(plan, Plan)
    assert plan[0].cause is Cause.UNPAIRED
