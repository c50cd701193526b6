"""Generations of a variant with the cache and without, for `tests/test_zoo*.py` to compare."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import Backend, CacheConfig, NoMatchError
from tests.sessions import every_session
from tests.zoo import VARIANTS
from tests.zoo.by_hand import ByHand, tensors_of
from tests.zoo.variant import Inputs, Variant

SETTINGS = dict(
    max_warmup_steps=1,
    residual_diff_threshold=1.0,
    max_continuous_cached_steps=1,
    forecaster=None,
    inner_backend="eager",
    on_no_match="raise",
)
DECISIONS = ["warmup", "threshold-one", "max-continuous"]  # Compute, reuse, compute.
REUSED = 1  # Number of the reused step.

Cut = tuple[int, int]  # Fn, Bn
Shape = tuple[int, int]  # Image size, text length

CUTS: tuple[Cut, ...] = ((1, 0), (2, 1), (4, 0))
SHAPES: tuple[Shape, ...] = ((0, 0), (1, 0), (2, 0), (0, 1))  # Of the calls, in turn.
FEW_SHAPES: tuple[Shape, ...] = ((0, 0), (1, 1))  # Enough where one graph serves all sizes.


@dataclass(frozen=True)
class Generation:
    """Three steps: the first is computed, the second reused, the third computed.

    Attributes:
        decisions: Those of every session that ran.
        outputs: The tensors of every step as the cached model gives them;
        plain: as the model alone does;
        by_hand: with blocks skipped by hand.
        atol: How far they may be apart: a functor that makes the model compute something in another way rounds
            otherwise, on some processors.
    """

    decisions: list[list[str]]
    outputs: list[list[Tensor]]
    plain: list[list[Tensor]]
    by_hand: list[list[Tensor]]
    atol: float = 0.0

    def check(self) -> None:
        """Computed steps are bitwise those of the model, and the reused one is that with blocks skipped by hand."""
        torch.testing.assert_close(self.by_hand[::2], self.plain[::2], rtol=0, atol=0)
        assert self.decisions == [DECISIONS], self.decisions
        torch.testing.assert_close(self.outputs[::2], self.plain[::2], rtol=0, atol=self.atol)
        torch.testing.assert_close(self.outputs[REUSED], self.by_hand[REUSED], rtol=0, atol=self.atol)
        assert not any(torch.equal(*pair) for pair in zip(self.outputs[REUSED], self.plain[REUSED], strict=True))


def atol_of(variant: Variant) -> float:
    return 0.0 if variant.functor is None else 2e-6


class Switch:
    """A backend that compiles for several cuts at once. Which of them runs can be changed from call to call.

    Attributes:
        chosen: The cut; None for the graphs as Dynamo made them.
        misses: Why graphs run uncached, for every cut.
        num_graphs: Graphs that Dynamo handed over.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.backends = {
            (fn, bn): Backend(CacheConfig(Fn_compute_blocks=fn, Bn_compute_blocks=bn, **SETTINGS)) for fn, bn in cuts
        }
        self.chosen: Cut | None = None
        self.misses: dict[Cut, list[str]] = {cut: [] for cut in cuts}
        self.num_graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        compiled: dict[Cut | None, Callable[..., Any]] = {None: gm.forward}
        for cut, backend in self.backends.items():
            try:
                compiled[cut] = backend(gm, example_inputs)
            except NoMatchError as miss:
                compiled[cut] = gm.forward
                self.misses[cut].append(str(miss))
        return lambda *args: compiled[self.chosen](*args)


@contextlib.contextmanager
def one_collection() -> Iterator[None]:
    """Collects garbage once, at the end, and not that of before: it would take a quarter of the time to compile."""
    gc.freeze()
    gc.disable()
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        gc.collect()
        gc.unfreeze()
        gc.enable()


@contextlib.contextmanager
def capturing(variant: Variant) -> Iterator[None]:
    """Lets Dynamo capture sizes that depend on data, if the variant has any."""
    flags = dict(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    with torch._dynamo.config.patch(flags) if variant.needs_capture else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def named(variant: Variant, *, has_clock: bool) -> Iterator[None]:
    """Names the request, where nothing else tells that two steps belong to one generation."""
    with contextlib.nullcontext() if has_clock else cachedit_fx.session(variant.name):
        yield


class Compiled:
    """A variant compiled for several cuts at once, and what it did.

    Attributes:
        found: A generation for every cut and shape.
        num_graphs: How many graphs Dynamo made.
        misses: Why graphs run uncached, for every cut.
    """

    def __init__(
        self,
        variant: Variant,
        cuts: Sequence[Cut],
        shapes: Sequence[Shape] = SHAPES,
        *,
        dtype: torch.dtype = torch.float32,
        dynamic: bool | None = None,
    ) -> None:
        torch._dynamo.reset()
        self.variant = variant
        self.found: dict[tuple[Cut, Shape], Generation] = {}
        switch = Switch(cuts)
        model, plain = variant.build(dtype), variant.build(dtype)
        call_before(variant, model, dtype)
        if variant.functor is not None:
            variant.functor().prepare(model)
        compiled = torch.compile(model, backend=switch, dynamic=dynamic)
        for shape in shapes:
            calls = variant.generation(size=shape[0], text=shape[1], dtype=dtype)
            expected = [tensors_of(plain(**call)) for call in calls]
            if variant.clock == "model":  # Parts are captured anew at a second call.
                with capturing(variant):
                    for call in calls:
                        compiled(**call)
            for cut in cuts:
                switch.chosen = cut
                cachedit_fx.reset()
                with capturing(variant), named(variant, has_clock=variant.clock == "graph"):
                    outputs = [tensors_of(compiled(**call)) for call in calls]
                by_hand = steps_by_hand(variant, plain, calls, cut)
                self.found[cut, shape] = Generation(decisions_in(model), outputs, expected, by_hand, atol_of(variant))
        self.num_graphs, self.misses = switch.num_graphs, switch.misses
        torch._dynamo.reset()

    def check(self, subtests: pytest.Subtests) -> None:
        """Every generation on its own; and that no graph runs uncached, unless Dynamo made several of the model."""
        for (cut, shape), generation in self.found.items():
            with subtests.test("Fn, Bn; image size, text length", cut=cut, shape=shape):
                if self.variant.clock != "model":
                    assert not self.misses[cut], self.misses[cut][0]
                generation.check()


def call_before(variant: Variant, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    if variant.needs_call:
        with torch.no_grad():
            model(**variant.inputs(dtype=dtype))


def steps_by_hand(variant: Variant, model: nn.Module, calls: Sequence[Inputs], cut: Cut) -> list[list[Tensor]]:
    """The tensors of every step of a generation whose second is reused."""
    reference = ByHand(variant, model, *cut)
    return [reference(skip=step == REUSED, **call) for step, call in enumerate(calls)]


def decisions_in(model: nn.Module) -> list[list[str]]:
    """Those of every session of `model`."""
    return [stats.decisions for stats in every_session(model)]


def cuts_of(variant: Variant) -> list[Cut]:
    """Those for which there are enough blocks, and its own; one far in where there is a second list to reach."""
    cuts = CUTS if len(variant.lists) > 1 else CUTS[:2]
    fitting = [cut for cut in cuts if sum(cut) < variant.num_blocks and cut not in variant.refused]
    return [*fitting, *variant.cuts]


every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
