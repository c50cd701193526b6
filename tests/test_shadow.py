"""Shadow mode computes every step, and reports the error that reuse would have had.

The reference runs the model and skips the blocks of the region by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx import CacheConfig, DBPruneConfig, ParamsModifier
from cachedit_fx.errors import ConfigError, NoMatchError
from tests import hybrid, tiny
from tests.hybrid import SINGLE, moving
from tests.regions import Span, at_steps, cached
from tests.sessions import every_session
from tests.test_pruning import STREAMS, drifting
from tests.tiny import assert_bitwise
from tests.tiny_pipelines import PIPELINES

FIELDS = dict(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.3, forecaster=None)
FIELDS |= dict(inner_backend="eager")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def relative_l2(one: Tensor, other: Tensor) -> float:
    return (torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other)).item()


def shadowed(model: Any, calls: list[dict[str, Tensor]], **fields: Any) -> tuple[list[Tensor], Any]:
    cachedit_fx.enable_cache(model, CacheConfig(**FIELDS | {"shadow": True} | fields))
    outputs = [model(**call)[0] for call in calls]
    return outputs, every_session(model)


def test_every_step_matches_the_model_bitwise_and_the_decisions_equal_those_without_shadow():
    outputs, (stats,) = shadowed(tiny.build(), moving())
    plain = tiny.build()
    assert_bitwise(outputs, [plain(**call)[0] for call in moving()])
    assert stats.cached_steps and len(stats.cached_steps) < 6
    followed = tiny.build()
    cachedit_fx.enable_cache(followed, CacheConfig(**FIELDS))
    for call in moving():
        followed(**call)
    (expected,) = every_session(followed)
    # The latents of this loop do not depend on the outputs, so both models had the same inputs.
    assert (stats.decisions, stats.residual_diffs) == (expected.decisions, expected.residual_diffs)
    assert expected.errors == {}


def test_the_errors_equal_those_of_blocks_that_are_skipped_by_hand():
    _, (stats,) = shadowed(tiny.build(), moving())
    plain, model = tiny.build(), tiny.build()
    span = Span(model.blocks[1:], STREAMS, at_steps([]), since=model.blocks[0])
    left: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _module, _args, result: left.append(result[0].clone()))
    plain.blocks[-1].register_forward_hook(lambda _module, _args, result: left.append(result[0].clone()))
    for step, call in enumerate(moving()):
        computed = plain(**call)[0]
        with cached(span):
            span.decide = at_steps([*range(100)] if step == 0 else [])
            if step:
                before = dict(span.residuals), span.last_probe
                reused = model(**call)[0]
                error = stats.errors[step]
                assert error.reused == (step in stats.cached_steps)
                assert error.output == pytest.approx(relative_l2(reused, computed), rel=1e-4)
                assert error.streams["hidden_states"] == pytest.approx(relative_l2(left[-1], left[-2]), rel=1e-4)
                span.residuals, span.last_probe = before
            if step not in stats.cached_steps:  # The policy computes this step, so its residual is cached from here on.
                span.decide = at_steps(range(100))
                model(**call)
    assert set(stats.errors) == set(range(1, len(moving())))  # At the first step nothing was cached.


def test_regions_are_skipped_according_to_their_own_decisions():
    fields = dict(Fn_compute_blocks=0, residual_diff_threshold=0.05, max_warmup_steps=1, inner_backend="eager")
    model = tiny.build()
    cachedit_fx.enable_cache(model, DBPruneConfig(**fields, shadow=True))
    outputs = [model(**call)[0] for call in drifting()]
    plain = tiny.build()
    assert_bitwise(outputs, [plain(**call)[0] for call in drifting()])
    found = every_session(model)
    for step in range(1, 8):
        reused = [stats.errors[step].reused for stats in found if step in stats.errors]
        assert reused and (
            all(reused) or not any(reused)
        )  # If the policy would reuse any region, only those regions are evaluated.
        assert len({stats.errors[step].output for stats in found if step in stats.errors}) == 1


def test_lists_with_separate_decisions_have_separate_errors():
    model = hybrid.build()
    modifiers = [ParamsModifier(max_cached_steps=0), ParamsModifier(residual_diff_threshold=1.0)]
    config = hybrid.config(shadow=True)
    cachedit_fx.enable_cache(model, config, params_modifiers=modifiers)
    for call in moving():
        model(**call)
    first, second = every_session(model)
    assert not any(error.reused for error in first.errors.values())
    assert all(second.errors[step].reused for step in second.cached_steps)
    assert set(second.errors[2].streams) == set(SINGLE)


def test_a_pipeline_in_shadow_mode_gives_the_uncached_output():
    plain = PIPELINES["wan"]
    pipe = plain.build(4)
    expected = plain.run(pipe, num_steps=6)
    cachedit_fx.enable_cache(pipe, CacheConfig(**FIELDS), shadow=True)
    torch.testing.assert_close(plain.run(pipe, num_steps=6), expected, rtol=0, atol=0)
    found = cachedit_fx.summary(pipe, logging=False)
    assert [stats.session for stats in found] == ["cond", "uncond"]
    assert all(set(stats.errors) == {1, 2, 3, 4, 5} for stats in found)
    json_like = found[0].to_dict()
    assert json_like["errors"][1]["output"] == found[0].errors[1].output


def test_an_error_grows_with_the_distance_from_the_last_computed_step():
    _, (stats,) = shadowed(tiny.build(), moving(), residual_diff_threshold=1.0, max_warmup_steps=1)
    outputs = [stats.errors[step].output for step in range(1, 8)]
    assert outputs == sorted(outputs) and outputs[0] > 0


def test_a_graph_that_writes_into_its_inputs_cannot_run_twice():
    class Writes(tiny.Transformer):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Any:
            hidden_states[:, :1] = 0
            return super().forward(hidden_states, encoder_hidden_states, timestep)

    model = tiny.frozen(Writes())
    cachedit_fx.enable_cache(model, CacheConfig(**FIELDS, on_no_match="raise"), shadow=True)
    with pytest.raises((NoMatchError, RuntimeError), match="may run twice on the same inputs"):
        model(**hybrid.calls()[0])


def test_shadow_must_be_a_bool():
    with pytest.raises(ConfigError, match="shadow must be True or False, got 'on'"):
        CacheConfig(shadow="on")
