"""Calls that look alike but belong to different branches, generations or models get separate sessions."""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from tests import tiny
from tests.fast_dispatches import enabled
from tests.sessions import every_session
from tests.tiny import TIMES, build, compiled, generate, latents, prompt, ran_blocks, step

ALL, FIRST = tiny.NUM_BLOCKS, 1  # Blocks that a computed and a reused step run.
EVERY_OTHER = [1, 3, 5, 7]  # Steps that a generation at TIMES reuses.

by_both = pytest.mark.parametrize("cached", [compiled, enabled], ids=["backend", "enable_cache"])
Cached = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def alone(seed: int = 1, *, model: nn.Module | None = None, times: tuple[float, ...] = TIMES) -> list[Tensor]:
    """The outputs of a generation with these latents and the first prompt, by the plain reference."""
    cache = tiny.reference(model or build(), prompt(), latents(seed), times)
    assert any(record.reused for record in cache.records)
    return [record.output for record in cache.records]


# Several calls in one step.


@by_both
def test_windows_of_one_prompt_are_separate_branches(cached: Cached):
    module, text = cached(build()), prompt()
    for _ in range(2):
        outputs: dict[int, list[Tensor]] = {1: [], 2: [], 3: []}
        for timestep in TIMES:
            for window, made in outputs.items():
                made.append(step(module, text, timestep, latents(window)))
        for window, made in outputs.items():
            tiny.assert_bitwise(made, alone(window))
    assert [stats.cached_steps for stats in every_session(module)] == [EVERY_OTHER] * 6


def test_an_additional_call_in_some_steps_does_not_affect_the_other_calls():
    module, text, outputs = compiled(build()), prompt(), {1: [], 2: []}
    for number, timestep in enumerate(TIMES):
        outputs[1].append(step(module, text, timestep, latents(1)))
        if 2 <= number < 6:  # As skip-layer guidance does between its start and its stop.
            outputs[2].append(step(module, text, timestep, latents(2)))
    plain = build()
    for number, timestep in enumerate(TIMES):
        if number not in EVERY_OTHER:
            torch.testing.assert_close(outputs[1][number], step(plain, text, timestep, latents(1)), rtol=0, atol=0)
    assert {len(made) for made in outputs.values()} == {8, 4}
    assert [stats.num_steps for stats in every_session(module)] == [8, 4]
    for number, made in enumerate(outputs[2]):  # A window never gets the residual of another one.
        wrong = [step(plain, text, TIMES[2 + number], latents(seed)) for seed in (1, 2)]
        assert (made - wrong[1]).abs().max() < 0.5 * (wrong[0] - wrong[1]).abs().max()


def test_a_diff_is_shared_only_between_calls_of_the_same_ordinal():
    module = compiled(build(), cfg_diff_compute_separate=False, enable_separate_cfg=True)
    texts = {"cond": prompt(1), "uncond": prompt(2)}
    for timestep in TIMES:
        for window in (1, 2):
            for text in texts.values():
                step(module, text, timestep, latents(window))
    cond, uncond, cond_2, uncond_2 = every_session(module)
    assert list(uncond.residual_diffs.values()) == list(cond.residual_diffs.values())
    assert list(uncond_2.residual_diffs.values()) == list(cond_2.residual_diffs.values())


# Several models.


@by_both
def test_models_that_share_their_first_block_do_not_share_state(cached: Cached):
    main, other = build(0), build(7)
    other.proj_in, other.proj_text, other.blocks[0] = main.proj_in, main.proj_text, main.blocks[0]
    expected = [alone(model=copy.deepcopy(model)) for model in (main, other)]
    text, modules = prompt(), [cached(main), cached(other)]
    outputs = [[step(module, text, timestep, latents()) for module in modules] for timestep in TIMES]
    for made, wanted in zip(zip(*outputs, strict=True), expected, strict=True):
        tiny.assert_bitwise(made, wanted)
    assert [stats.num_steps for stats in every_session(main)] == [8]
    cachedit_fx.reset(main)
    assert not every_session(main) and [stats.num_steps for stats in every_session(other)] == [8]


@by_both
def test_models_whose_weights_are_buffers_do_not_share_state(cached: Cached):
    first, second = build(0), build(0)
    for block in second.blocks[1:]:
        for parameter in block.parameters():
            parameter.mul_(1.7)
    plain = copy.deepcopy(second)
    for module in (*first.modules(), *second.modules()):
        for name, parameter in [*module._parameters.items()]:
            del module._parameters[name]
            module.register_buffer(name, parameter.data)
    modules, text = [cached(first), cached(second)], prompt()
    for timestep in TIMES[:4]:
        step(modules[0], text, timestep, latents())
    output = step(modules[1], text, TIMES[4], latents())  # Like the second expert of Wan, which runs below a boundary.
    torch.testing.assert_close(output, step(plain, text, TIMES[4], latents()), rtol=0, atol=0)
    assert [[stats.num_steps for stats in every_session(module)] for module in (first, second)] == [[4], [1]]


# Cached values belong to these modules and weights.


def replace_a_block(module: nn.Module) -> None:
    module.blocks[2] = copy.deepcopy(module.blocks[2])


def replace_a_layer(module: nn.Module) -> None:
    module.blocks[2].image = copy.deepcopy(module.blocks[2].image)


def reorder(module: nn.Module) -> None:
    module.blocks[1], module.blocks[2] = module.blocks[2], module.blocks[1]


def load(module: nn.Module) -> None:
    module.load_state_dict(module.state_dict())


def assign(module: nn.Module) -> None:
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [replace_a_block, replace_a_layer, reorder, load, assign])
def test_the_step_after_a_change_of_the_region_is_computed(change: Callable[[nn.Module], None]):
    module, text = enabled(build()), prompt()
    generate(module, text, latents(), TIMES[:3])
    change(module)
    assert ran_blocks(module, text, TIMES[3], latents()) == ALL
    assert [ran_blocks(module, text, t, latents()) for t in (0.69, 0.68)] == [FIRST, FIRST]
    change(module)  # A second change, after calls that may have used fast dispatch.
    assert ran_blocks(module, text, 0.67, latents()) == ALL


@pytest.mark.parametrize("change", [replace_a_block, reorder, load, assign])
def test_the_bare_backend_detects_replaced_blocks_and_weights(change: Callable[[nn.Module], None]):
    model, text = build(), prompt()
    module = compiled(model)
    generate(module, text, latents(), TIMES[:3])
    change(model)
    assert ran_blocks(module, text, TIMES[3], latents()) == ALL


@by_both
def test_the_step_after_a_change_of_the_attention_processor_is_computed(cached: Cached):
    class Processor:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __call__(self, value: Tensor) -> Tensor:
            return self.scale * value

    class WithProcessor(tiny.Block):
        processor: Any = Processor(1.0)

        def __init__(self) -> None:
            super().__init__()
            self.processor = Processor(1.0)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            hidden_states, encoder_hidden_states = super().forward(hidden_states, encoder_hidden_states, scale)
            return self.processor(hidden_states), encoder_hidden_states

    model, text = build(), prompt()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = WithProcessor().eval().requires_grad_(False)
        model.blocks[i].load_state_dict(block.state_dict())
    module = cached(model)
    generate(module, text, latents(), TIMES[:3])
    model.blocks[2].processor = Processor(2.0)
    output = step(module, text, TIMES[3], latents())
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(output, step(model, text, TIMES[3], latents()), rtol=0, atol=0)


# The prompt and the timestep.


@by_both
def test_overwriting_a_prompt_in_inference_mode_starts_a_new_session(cached: Cached):
    with torch.inference_mode():
        module, text = cached(build()), prompt(1)
        generate(module, text, latents(), TIMES[:4])
        text.copy_(text[[1, 0]])  # The same values in another order.
        assert ran_blocks(module, text, TIMES[4], latents()) == ALL
    assert [stats.began for stats in every_session(module)] == ["new", "conditioning-changed"]


class StoresContext(tiny.Transformer):
    """Stores its context as an attribute."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        self.context = encoder_hidden_states
        return super().forward(hidden_states, encoder_hidden_states, timestep)


def test_a_stored_context_that_the_loop_rebuilds_stays_in_one_generation():
    module = enabled(StoresContext().eval().requires_grad_(False))
    for timestep in TIMES:
        step(module, prompt(1), timestep, latents())
    # Dynamo also held the context of the first call while it traced it.
    assert [stats.num_steps for stats in every_session(module)] in ([8], [1, 7])


@pytest.mark.parametrize(
    "number", [float, np.float32, np.float64, lambda t: int(1000 * t), lambda t: np.int64(1000 * t)]
)
def test_a_timestep_may_be_a_number(number: Callable[[float], Any]):
    class Numbered(tiny.Transformer):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Any) -> tuple[Tensor, ...]:
            return super().forward(hidden_states, encoder_hidden_states, self.time(hidden_states))

        @torch._dynamo.disable
        def time(self, hidden_states: Tensor) -> Tensor:
            return hidden_states.new_full((len(hidden_states),), 0.5)

    module, text = enabled(Numbered().eval().requires_grad_(False), residual_diff_threshold=1.0), prompt()
    for timestep in TIMES:
        module(latents(), text, number(timestep))
    [stats] = every_session(module)
    assert stats.num_steps == 8 and stats.timesteps == pytest.approx([float(number(t)) for t in TIMES])
    assert stats.cached_steps == [*range(1, 8)]


class Embeds(nn.Module):
    """Its loop is after a graph break, in a graph whose input `t` is the time embedding, [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()
        self.embed = nn.Linear(1, tiny.TOKENS)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        t = self.embed(t[:, None]).sin()
        torch._dynamo.graph_break()
        return self.inner(hidden_states, encoder_hidden_states, t.mean(1) + 2)


def test_an_embedding_that_is_named_like_a_timestep_is_not_a_timestep_input():
    model, text = Embeds().eval().requires_grad_(False), prompt()
    fields = tiny.fields(inner_backend="eager", residual_diff_threshold=1.0)
    bare = torch.compile(model, backend=cachedit_fx.Backend(cachedit_fx.CacheConfig(**fields)))
    for timestep in TIMES:
        bare(latents(), text, torch.full((tiny.BATCH,), timestep))
    assert [(stats.timesteps, stats.cached_steps) for stats in every_session(model)] == [([None] * 8, [])]
    torch._dynamo.reset()
    cachedit_fx.reset()
    cachedit_fx.enable_cache(model, **fields)
    for timestep in TIMES:
        model(latents(), text, torch.full((tiny.BATCH,), timestep))
    [stats] = every_session(model)
    assert stats.timesteps == pytest.approx(TIMES) and stats.cached_steps == [*range(1, 8)]


@by_both
def test_an_empty_batch_runs_as_without_the_cache(cached: Cached):
    module = cached(build())
    output = step(module, prompt(batch=0), 0.5, latents(batch=0))
    assert output.shape == (0, tiny.TOKENS, 4)
    assert ran_blocks(module, prompt(), 0.5, latents()) == ALL


# Named requests.


def names(module: nn.Module) -> list[str]:
    """The names of the sessions' requests, or the first word of the label of a session without one."""
    return [stats.session.split(",")[0].split()[0] for stats in every_session(module)]


def streaming(module: Any, key: str, text: Tensor, seed: int) -> Any:
    with torch.no_grad(), cachedit_fx.session(key):
        for timestep in TIMES:
            yield step(module, text, timestep, latents(seed))


def test_interleaved_generators_keep_their_session_names():
    module, text = compiled(build()), prompt()
    running = [streaming(module, "a", text, 1), streaming(module, "b", text, 2)]
    outputs = [*zip(*running, strict=True)]
    for seed, made in zip((1, 2), zip(*outputs, strict=True), strict=True):
        tiny.assert_bitwise(made, alone(seed))
    step(module, text, 0.2, latents())
    assert names(module) == ["a", "b", "conditioning"]


def test_a_generator_keeps_its_session_name_in_any_context_until_it_is_closed():
    module, text = compiled(build()), prompt()
    running = streaming(module, "a", text, 1)
    made = [contextvars.copy_context().run(next, running) for _ in TIMES]  # As a server's thread pool drives it.
    assert next(running, None) is None
    tiny.assert_bitwise(made, alone(1))
    left = streaming(module, "b", text, 2)
    next(left)
    left.close()
    step(module, text, 0.2, latents())
    assert names(module) == ["a", "b", "conditioning"]


def test_a_context_manager_made_of_a_generator_names_what_is_inside_it():
    @contextlib.contextmanager
    def request(key: str) -> Any:
        with cachedit_fx.session(key):
            yield

    module, text = compiled(build()), prompt()
    with request("a"):
        step(module, text, 0.9, latents())
        with cachedit_fx.session("b"):
            step(module, text, 0.9, latents())
    decorated = cachedit_fx.session("c")(lambda: step(module, text, 0.9, latents()))
    decorated()
    step(module, text, 0.9, latents())
    assert names(module) == ["a", "b", "c", "conditioning"]
