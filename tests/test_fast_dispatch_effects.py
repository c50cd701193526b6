"""A discarded run of the head leaves no state behind, and a graph with effects is left to Dynamo.

Fast dispatch runs the head of a graph, which decides whether the step is computed, before it checks all of Dynamo's
guards. In these tests a block of the region changes between two steps. A reused step does not detect this. A computed
step detects it after the head ran; that run is discarded, and the head runs again in another graph.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.frontend import fast_dispatch, torch_internals
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.effects import effect_of
from tests import tiny
from tests.fast_dispatches import enabled, last, reason, served, warm


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_dispatch, "_logged", set())


def drop_bias(module: nn.Module, block: int = 2) -> None:
    module.blocks[block].image.bias = None


# Effects.


class WritesInput(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        hidden_states.mul_(0.9)
        return super().forward(hidden_states, encoder_hidden_states, timestep)


class WritesBuffer(tiny.Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        self.count.add_(1)
        return super().forward(hidden_states, encoder_hidden_states, timestep)


class Draws(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        noise = 0.1 * torch.randn(hidden_states.shape)
        return super().forward(hidden_states + noise, encoder_hidden_states, timestep)


class DropsOut(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        hidden_states = F.dropout(hidden_states, 0.1, training=True)
        return super().forward(hidden_states, encoder_hidden_states, timestep)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (WritesInput, "the forward writes in place into one of its inputs (`mul_"),
        (WritesBuffer, "the forward writes in place into one of its inputs (`add_"),
        (Draws, "the forward draws random numbers (`"),
        (DropsOut, "the forward draws random numbers (`"),
    ],
)
def test_a_graph_with_effects_is_left_to_dynamo_and_runs_them_once(cls: type[tiny.Transformer], why: str):
    plain = tiny.frozen(cls())
    module = enabled(copy.deepcopy(plain), residual_diff_threshold=0.0)
    found = []
    for one in (plain, module):
        torch.manual_seed(5)
        latents, outputs = tiny.latents(), []
        for i, timestep in enumerate(tiny.TIMES[:5]):
            if i == 3:
                drop_bias(one)
            outputs.append(tiny.step(one, tiny.prompt(), timestep, latents))
        found.append((*outputs, latents, *one.buffers()))
    tiny.assert_bitwise(found[1], found[0])
    with served(module) as calls:
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert calls == [False]
    assert reason(module).startswith(why)


def effect_in(function: Callable[..., Any], *args: Tensor) -> str:
    """The first effect in the graph that Dynamo captures from a function, or an empty string."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        found.append(effect_of(Program(gm.graph)))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found[0]


def filled(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made[..., :1] = x[..., :1]
    made[..., 1:].copy_(x[..., 1:])
    made += 1
    return made.mul_(2)


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


def with_gradients(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x + 1


def attention(x: Tensor, dropout_p: float) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=dropout_p)


def written_item(x: Tensor) -> Tensor:
    x.view(-1)[0] = 1
    return x + 1


@torch.library.custom_op("cachedit_tests::writes", mutates_args=("value",))
def writes(value: Tensor) -> None:
    value.add_(1)


@pytest.mark.parametrize(
    "function",
    [
        filled,
        under_autocast,
        tiny.watched,
        functools.partial(attention, dropout_p=0.0),
        lambda x: F.dropout(x, 0.5, False),
        lambda x: F.dropout(F.gelu(x), p=0.0, training=True),
        lambda x: F.layer_norm(x, (4,)).chunk(2, -1)[0].float(),
    ],
)
def test_pure_computation_has_no_effect(function: Callable[..., Any]):
    assert effect_in(function, torch.ones(4, 4)) == ""


@pytest.mark.parametrize(
    ("function", "effect"),
    [
        (written_item, "writes in place"),
        (lambda x: F.relu(x, inplace=True) + 1, "writes in place"),
        (lambda x: torch.add(x, 1, out=x) + 1, "writes in place"),
        (lambda x: (writes(x), x + 1)[1], "writes in place"),
        (lambda x: x.view(-1).unsqueeze(0).zero_() + 1, "writes in place"),
        (torch.rand_like, "draws random numbers"),
        (lambda x: torch.empty_like(x).normal_(), "draws random numbers"),
        (lambda x: x.bernoulli(), "draws random numbers"),
        (lambda x: F.dropout2d(x[None, None], 0.5), "draws random numbers"),
        (lambda x: F.gumbel_softmax(x), "draws random numbers"),
        (functools.partial(attention, dropout_p=0.1), "draws random numbers"),
        (with_gradients, "sets a state"),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), "calls an operator on functions"),
    ],
)
def test_an_effect_is_found(function: Callable[..., Any], effect: str):
    assert effect_in(function, torch.ones(4, 4)).startswith(effect)


# Discarded runs of the head.


def test_each_changed_block_costs_one_extra_run_of_the_head():
    module = enabled(tiny.build(), residual_diff_threshold=0.0)
    ran = []
    for block in (None, 1, 2, 3):
        if block is not None:
            drop_bias(module, block)
        for timestep in tiny.TIMES[:3]:
            prompt = tiny.prompt()
            ran.append(tiny.ran_blocks(module, prompt, timestep, tiny.latents()))
    changed = tiny.NUM_BLOCKS + 1  # The head of the known graph, and then the whole new graph.
    assert ran == [4, 4, 4, changed, 4, 4, changed, 4, 4, changed, 4, 4]
    with served(module) as calls:
        tiny.step(module, tiny.prompt(), 0.5, tiny.latents())
    assert calls == [True] and reason(module) == ""


def test_a_block_that_changes_back_and_forth_costs_one_extra_head_each_way():
    """Like an adapter that is switched on and off. Later switches find both graphs and check all guards first."""
    module = enabled(tiny.build(), residual_diff_threshold=0.0)
    bias, ran = module.blocks[2].image.bias, []
    for present in (True, False, True, False, True, False, True):
        module.blocks[2].image.bias = bias if present else None
        ran.append([tiny.ran_blocks(module, tiny.prompt(), t, tiny.latents()) for t in (1.0, 0.9)])
    assert ran == [[4, 4], [5, 4], [5, 4], [4, 4], [4, 4], [4, 4], [4, 4]]
    with served(module) as calls:
        for present in (False, True):
            module.blocks[2].image.bias = bias if present else None
            tiny.step(module, tiny.prompt(), 0.5, tiny.latents())
    assert calls == [True, True]


def test_a_discarded_run_of_the_head_leaves_no_state_in_its_session():
    """Every call has a new prompt object, and the session continues with the next call."""

    def generation(module: nn.Module) -> list[Tensor]:
        outputs = []
        for i, timestep in enumerate(tiny.TIMES):
            if i == 4:  # A computed step of a generation in which every other step is reused.
                drop_bias(module)
            outputs.append(tiny.step(module, tiny.prompt(), timestep, tiny.latents()))
        return outputs

    expected = generation(enabled(tiny.build(), fast_dispatch=False))
    torch._dynamo.reset()
    module = enabled(tiny.build())
    with served(module) as calls:
        outputs = generation(module)
    assert calls == [False, True, True, True, False, True, True, True]
    tiny.assert_bitwise(outputs, expected)
    (stats,) = cachedit_fx.summary(module, logging=False)
    assert (stats.num_steps, stats.cached_steps) == (8, [1, 3, 5, 7])
    assert stats.timesteps == pytest.approx(list(tiny.TIMES))


def test_a_decider_is_called_once_per_step():
    class Every:
        asked = 0

        def decide(self, step: Any) -> bool:
            self.asked += 1
            return True

    decider = Every()
    module = enabled(tiny.build(), decider=decider)
    for i, timestep in enumerate(tiny.TIMES[:5]):
        if i == 3:
            drop_bias(module)
        tiny.step(module, tiny.prompt(), timestep, tiny.latents())
    assert decider.asked == last(module).num_steps == 5


# A forward that changes its keyword arguments.


def own_keywords(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Copies `options`, like the wrapper of diffusers for forwards that take `joint_attention_kwargs`."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs["options"] = dict(kwargs.get("options") or {})
        kwargs["options"].pop("scale", None)
        return forward(self, *args, **kwargs)

    return wrapper


class WithOptions(tiny.Transformer):
    @own_keywords
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, options: Any) -> Any:
        return super().forward(hidden_states, encoder_hidden_states, timestep)


class EmptiesOptions(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, options: Any) -> Any:
        options["calls"] = 1
        return super().forward(hidden_states, encoder_hidden_states, timestep)


@pytest.mark.parametrize(
    ("cls", "why"),
    [(WithOptions, ""), (EmptiesOptions, "the forward changes L['options']")],
    ids=["own", "the caller's"],
)
def test_a_forward_may_change_only_its_copy_of_the_keywords(cls: type[tiny.Transformer], why: str):
    module = enabled(tiny.frozen(cls()))
    given = dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=torch.ones(tiny.BATCH))
    first, options = module(**given, options={})[0], {}
    with served(module) as calls:
        second = module(**given, options=options)[0]
    assert calls == [not why] and reason(module) == why
    assert options == ({"calls": 1} if why else {})
    torch.testing.assert_close(second, first, rtol=0, atol=0)


# The switch.


def test_without_fast_dispatch_dynamo_makes_every_call():
    module = warm(tiny.build(), fast_dispatch=False)
    backend = module._compiled_call_impl.compiled
    assert reason(module) == "fast_dispatch is False"
    found = {}
    for name, is_fast in (("off", False), ("on", True), ("off again", False)):
        cachedit_fx.refresh_context(module, fast_dispatch=is_fast)
        with served(module) as calls:
            tiny.generate(module, tiny.prompt(), tiny.latents())
        found[name] = calls
    assert found == {"off": [False] * 8, "on": [False] + [True] * 7, "off again": [False] * 8}
    assert module._compiled_call_impl.compiled is backend  # Nothing was compiled for it.
    assert reason(module) == "fast_dispatch is False"


# Other versions of torch.


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def no_record(*_: Any) -> Any:
    raise AttributeError("'OutputGraph' object has no attribute 'random_calls'")


@pytest.fixture(params=["guards", "record-of-the-trace"])
def another_torch(request: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Simulates a version without a private name. The installed Dynamo may use the name itself."""
    if request.param == "guards":
        return lambda patch: patch.delattr("torch._dynamo.eval_frame._debug_get_cache_entry_list")
    return lambda patch: patch.setattr("cachedit_fx.frontend.capture.effect_of_call", no_record)


def test_a_missing_private_name_of_dynamo_causes_one_warning(another_torch: Any, monkeypatch: Any, caplog: Any):
    expected = tiny.generate(enabled(tiny.build(), fast_dispatch=False), tiny.prompt(), tiny.latents())
    torch._dynamo.reset()
    another_torch(monkeypatch)
    for _ in range(2):
        module = enabled(tiny.build())
        with served(module) as calls:
            outputs = tiny.generate(module, tiny.prompt(), tiny.latents())
        assert not any(calls)
        assert "the guards of this version of torch cannot be read" in reason(module)
        tiny.assert_bitwise(outputs, expected)
    (warning,) = warnings_in(caplog)
    assert f"does not work with torch {torch.__version__} (" in warning and "What it costs: Dynamo checks" in warning


def test_an_untested_version_is_logged_and_served(monkeypatch: Any, caplog: Any):
    monkeypatch.setattr(torch_internals, "TESTED_VERSIONS", ("1.0.",))
    with caplog.at_level(logging.INFO, logger="cachedit_fx"):
        for _ in range(2):
            module = warm(tiny.build())
            with served(module) as calls:
                tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
            assert calls == [True]
    messages = [r.getMessage() for r in caplog.records if "was tested on torch" in r.getMessage()]
    assert messages == [f"cachedit_fx: fast_dispatch was tested on torch 1.0.x, not on {torch.__version__}"]
    assert not warnings_in(caplog)


def test_the_installed_version_is_a_tested_one():
    assert torch.__version__.startswith(torch_internals.TESTED_VERSIONS)


def test_a_reason_is_logged_once(caplog: Any):
    with caplog.at_level(logging.INFO, logger="cachedit_fx"):
        module = warm(tiny.frozen(Draws()))
    messages = [
        r.getMessage() for r in caplog.records if r.getMessage().startswith("cachedit_fx: Dynamo makes every call")
    ]
    assert messages == [f"cachedit_fx: Dynamo makes every call of Draws, because {reason(module)}"]
