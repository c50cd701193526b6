"""Generations of a variant with and without the cache, which `tests/test_zoo*.py` compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import cachedit_fx
from cachedit_fx import Backend, BlockAdapter, CacheConfig
from tests.sessions import every_session
from tests.zoo import VARIANTS
from tests.zoo.table import watched
from tests.zoo.twins import Twins
from tests.zoo.variant import Cut, Inputs, Variant
from tests.zoo.variant_reference import VariantReference, tensors_of

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

Shape = tuple[int, int]  # Image size, text length

CUTS: tuple[Cut, ...] = ((1, 0), (2, 1), (4, 0))
SHAPES: tuple[Shape, ...] = ((0, 0), (1, 0), (2, 0), (0, 1))  # The shapes of the calls, in order.


@dataclass(frozen=True)
class Generation:
    """Three steps: the first is computed, the second reused, the third computed.

    Attributes:
        decisions: The decisions of every session that ran.
        outputs: The output tensors of every step of the cached model.
        plain: The same for the uncached model.
        by_hand: The same with blocks skipped by hand.
        atol: The absolute tolerance of the comparison: a functor that changes the computation of the model changes the
            rounding on some processors.
    """

    decisions: list[list[str]]
    outputs: list[list[Tensor]]
    plain: list[list[Tensor]]
    by_hand: list[list[Tensor]]
    atol: float = 0.0

    def check(self) -> None:
        """Asserts that computed steps match the model, and the reused step the one with blocks skipped by hand."""
        torch.testing.assert_close(self.by_hand[::2], self.plain[::2], rtol=0, atol=0)
        assert self.decisions == [DECISIONS], self.decisions
        torch.testing.assert_close(self.outputs[::2], self.plain[::2], rtol=0, atol=self.atol)
        torch.testing.assert_close(self.outputs[REUSED], self.by_hand[REUSED], rtol=0, atol=self.atol)
        # An output that is an input of every step (a KV cache) is equal in all of them.
        first, plain, reused = self.plain[0], self.plain[REUSED], self.outputs[REUSED]
        changing = [i for i in range(len(plain)) if not torch.equal(first[i], plain[i])]
        assert changing and not any(torch.equal(reused[i], plain[i]) for i in changing)


def atol_of(variant: Variant) -> float:
    return 0.0 if variant.functor is None else 2e-6


@contextlib.contextmanager
def capturing(variant: Variant) -> Iterator[None]:
    """Makes Dynamo capture sizes that depend on data, if the variant has any."""
    flags = dict(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    with torch._dynamo.config.patch(flags) if variant.needs_capture else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def named(variant: Variant, *, has_timestep: bool) -> Iterator[None]:
    """Names the request if nothing else identifies the steps of one generation."""
    with contextlib.nullcontext() if has_timestep else cachedit_fx.session(variant.name):
        yield


class Cached:
    """A variant with `enable_cache`, captured once in its `dtype` and inference mode, and disabled at the end.

    The captured graph is compiled once per cut.

    Args:
        dynamic: Whether it is captured for all sizes, as in `torch.compile`; otherwise there is a single shape.

    Attributes:
        found: A generation for every cut and shape.
        num_graphs: The number of graphs that Dynamo made of it.
        row: Its row in docs/models.md.
    """

    def __init__(self, variant: Variant, cuts: Sequence[Cut], shapes: Sequence[Shape], *, dynamic: bool) -> None:
        self._variant = variant
        self._model, self._plain = variant.build(variant.dtype), variant.build(variant.dtype)
        call_before(variant, self._model, variant.dtype)
        before = dict(vars(self._model))
        self._first, *others = cuts
        self._twins = Twins({cut: config_of(cut) for cut in others})
        target = enable(variant, self._model, config_of(self._first), dynamic=dynamic)
        self.found: dict[tuple[Cut, Shape], Generation] = {}
        with self._twins.compiled(), watched() as all_observed:
            with watched() as observed, named(variant, has_timestep=variant.timestep_input != "none"):
                self._model(**variant.inputs(dtype=variant.dtype))
            for shape in shapes:
                self._run(shape, cuts)
        self.num_graphs, self.row = all_observed.num_graphs, observed.row(variant)
        cachedit_fx.disable_cache(target)
        assert dict(vars(self._model)) == before
        call = variant.inputs(dtype=variant.dtype)
        torch.testing.assert_close(tensors_of(self._model(**call)), tensors_of(self._plain(**call)), rtol=0, atol=0)

    def _run(self, shape: Shape, cuts: Sequence[Cut]) -> None:
        variant, model = self._variant, self._model
        calls = variant.generation(size=shape[0], text=shape[1], dtype=variant.dtype)
        plain = [tensors_of(self._plain(**call)) for call in calls]
        for cut in cuts:
            cachedit_fx.reset()
            instead = contextlib.nullcontext() if cut == self._first else self._twins.instead(cut)
            with named(variant, has_timestep=variant.timestep_input != "none"), instead:
                outputs = [tensors_of(model(**call)) for call in calls]
            by_hand = steps_by_hand(variant, self._plain, calls, cut)
            self.found[cut, shape] = Generation(decisions_in(model), outputs, plain, by_hand, atol_of(variant))


class Compiled:
    """A variant compiled by the bare backend in float32, for one cut.

    Attributes:
        found: A generation for every shape.
        num_graphs: The number of graphs that Dynamo made.
    """

    def __init__(self, variant: Variant, cut: Cut, shapes: Sequence[Shape] = SHAPES) -> None:
        torch._dynamo.reset()
        self.found: dict[Shape, Generation] = {}
        self.num_graphs, backend = 0, Backend(config_of(cut))
        model, plain = variant.build(), variant.build()

        def counted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            self.num_graphs += 1
            return backend(gm, example_inputs)

        compiled = torch.compile(model, backend=counted)
        for shape in shapes:
            calls = variant.generation(size=shape[0], text=shape[1])
            expected = [tensors_of(plain(**call)) for call in calls]
            cachedit_fx.reset()
            with capturing(variant), named(variant, has_timestep=variant.timestep_input == "graph"):
                outputs = [tensors_of(compiled(**call)) for call in calls]
            by_hand = steps_by_hand(variant, plain, calls, cut)
            self.found[shape] = Generation(decisions_in(model), outputs, expected, by_hand, atol_of(variant))
        torch._dynamo.reset()


def config_of(cut: Cut) -> CacheConfig:
    return CacheConfig(Fn_compute_blocks=cut[0], Bn_compute_blocks=cut[1], **SETTINGS)


def enable(variant: Variant, model: nn.Module, config: CacheConfig, *, dynamic: bool) -> Any:
    """Enables the cache, with the functor that the variant needs. Returns the object for which it was enabled."""
    functor = variant.functor() if variant.functor is not None else None
    target = model if functor is None else BlockAdapter(transformer=model, patch_functor=functor)
    return cachedit_fx.enable_cache(target, config, dynamic=dynamic or None)


def call_before(variant: Variant, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    if variant.needs_call:
        with torch.no_grad():
            model(**variant.inputs(dtype=dtype))


def steps_by_hand(variant: Variant, model: nn.Module, calls: Sequence[Inputs], cut: Cut) -> list[list[Tensor]]:
    """The output tensors of every step of a generation whose second step is reused."""
    reference = VariantReference(variant, model, *cut)
    return [reference(skip=step == REUSED, **call) for step, call in enumerate(calls)]


def decisions_in(model: nn.Module) -> list[list[str]]:
    """The decisions of every session of `model`."""
    return [stats.decisions for stats in every_session(model)]


def cuts_of(variant: Variant) -> list[Cut]:
    """The cuts for which the variant has enough blocks, its own cuts, and one that reaches into a second list."""
    cuts = CUTS if len(variant.lists) > 1 else CUTS[:2]
    fitting = [cut for cut in cuts if sum(cut) < variant.num_blocks and cut not in variant.refused]
    return [*fitting, *variant.cuts]


every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
