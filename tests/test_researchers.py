"""Models without special support are cached, or run uncached with a reason that helps their author.

A generation of three steps: the first is computed, the second reused, the third computed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.frontend import backend
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.passes.plan import Plan
from tests.messages import flat
from tests.researchers.case import Cached, Case, Refused
from tests.researchers.cases import BARE_ONLY, CASES, TAKE_TURNS
from tests.researchers.port_reference import PortReference, build, tensors_of
from tests.sessions import every_session

SETTINGS = dict(
    max_warmup_steps=1,
    residual_diff_threshold=1.0,
    max_continuous_cached_steps=1,
    forecaster=None,
    inner_backend="eager",
)
COUNTS = {"f1b0": (1, 0), "f2b1": (2, 1)}


def compiled(model: nn.Module, config: CacheConfig) -> nn.Module:
    return torch.compile(model, backend=cachedit_fx.Backend(config))


def enabled(model: nn.Module, config: CacheConfig) -> nn.Module:
    return cachedit_fx.enable_cache(model, config)


SURFACES = {"backend": compiled, "enable_cache": enabled}
PAIRS = [("backend", "f1b0"), ("enable_cache", "f2b1")]
ALL_PAIRS = [(surface, counts) for surface in SURFACES for counts in COUNTS]


def pairs(number: int, name: str) -> list[tuple[str, str]]:
    """The surfaces and counts that a case is run with; the first case is run with all of them.

    Every third of the other cases, and those whose outcome depends on the surface, are run with both surfaces; the
    rest alternate.
    """
    if number == 0:
        return ALL_PAIRS
    if name in BARE_ONLY:
        return PAIRS[:1]
    is_both = CASES[name].bare is not None or (number % 3 == 0 and name not in TAKE_TURNS)
    return PAIRS if is_both else [PAIRS[number % 2]]


def cases(outcome: type) -> pytest.MarkDecorator:
    """The cases with the given outcome, each with the names of a surface and of the counts."""
    chosen = [
        pytest.param(case, surface, counts, id=f"{name}-{surface}-{counts}")
        for number, (name, case) in enumerate(CASES.items())
        for surface, counts in pairs(number, name)
        if isinstance(case.outcome_by(surface), outcome)
    ]
    return pytest.mark.parametrize(("case", "surface", "counts"), chosen)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def config(counts: str, **fields: Any) -> CacheConfig:
    fn, bn = COUNTS[counts]
    return CacheConfig(**{**SETTINGS, "Fn_compute_blocks": fn, "Bn_compute_blocks": bn, **fields})


def run(case: Case, step: Callable[[int, Callable[[nn.Module], Any]], Any]) -> list[list[Tensor]]:
    """The outputs of the generation of a case."""
    with torch._dynamo.config.patch(**dict(case.dynamo)):
        return [tensors_of(step(number, call)) for number, call in enumerate(case.calls())]


def uncached(case: Case) -> list[list[Tensor]]:
    model = build(case.model)
    return run(case, lambda _, call: call(model))


def reused(case: Case) -> list[int]:
    """The steps that the cached model should reuse."""
    return [step for step, reason in enumerate(case.decisions) if reason == "threshold-one"]


def by_hand(case: Case, counts: str) -> list[list[Tensor]]:
    model = build(case.model)
    reference = PortReference(model, model.block_calls(), case.port, *case.ran.get(counts, COUNTS[counts]))
    return run(case, lambda number, call: reference.step(call, reuse=number in reused(case)))


@contextmanager
def recorded_plans() -> Iterator[list[Plan]]:
    """Collects the plan of every graph that is cached."""
    plans: list[Plan] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        found = rewrite(*args, **kwargs)
        plans.extend([found.plan] if isinstance(found, Rewritten) else [])
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "rewrite", recording)
        yield plans


@cases(Cached)
def test_a_model_without_special_support_is_cached(case: Case, surface: str, counts: str):
    expected = case.outcome_by(surface)
    plain, reference = uncached(case), by_hand(case, counts)
    model = SURFACES[surface](build(case.model), config(counts, on_no_match="raise"))
    with recorded_plans() as plans:
        outputs = run(case, lambda _, call: call(model))
    (stats,) = every_session(model)
    assert stats.region == getattr(expected, counts)
    labels = {match.label.removeprefix("pattern ").split(" (")[0] for plan in plans for match in plan.chain}
    assert labels == {expected.pattern}
    assert tuple(stats.decisions) == case.decisions
    for step in range(3):
        tolerance = case.tolerance if step in reused(case) else 0
        torch.testing.assert_close(outputs[step], reference[step], rtol=0, atol=tolerance)
        is_plain = all(torch.equal(*pair) for pair in zip(outputs[step], plain[step], strict=True))
        assert is_plain == (step not in reused(case))


@pytest.mark.parametrize("name", [name for name in CASES if "autocast" in name])
def test_separately_compiled_pieces_preserve_their_context(name: str):
    case = CASES[name]
    model = enabled(build(case.model), config("f1b0", inner_backend="aot_eager", on_no_match="raise"))
    outputs = run(case, lambda _, call: call(model))
    assert not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(outputs, by_hand(case, "f1b0"), rtol=0, atol=0)


@cases(Refused)
def test_a_model_that_cannot_be_cached_runs_uncached_and_reports_the_reason(
    case: Case, surface: str, counts: str, caplog: pytest.LogCaptureFixture
):
    model = SURFACES[surface](build(case.model), config(counts))
    with caplog.at_level(logging.WARNING, logger="cachedit_fx"):
        outputs = run(case, lambda _, call: call(model))
    torch.testing.assert_close(outputs, uncached(case), rtol=0, atol=0)
    assert not cachedit_fx.is_cached(model)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("cachedit_fx")]
    assert any(says(message, case.outcome_by(surface)) for message in messages)


@cases(Refused)
def test_a_model_that_cannot_be_cached_raises_with_on_no_match_raise(case: Case, surface: str, counts: str):
    model = SURFACES[surface](build(case.model), config(counts, on_no_match="raise"))
    with pytest.raises((BackendCompilerFailed, cachedit_fx.NoMatchError)) as caught:
        run(case, lambda _, call: call(model))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, cachedit_fx.NoMatchError)
    assert says(str(error), case.outcome_by(surface))


def says(message: str, expected: Refused) -> bool:
    message = flat(message)
    cause = f"{expected.cause.value}: " if expected.cause is not None else ""
    return cause in message and re.search(expected.message, message, re.DOTALL) is not None
