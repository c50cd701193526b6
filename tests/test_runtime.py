"""The effects of a single call on its session: errors, changes of shape, decisions and tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx.runtime.region_run import in_layout
from tests import tiny
from tests.sessions import every_session
from tests.tiny import TIMES, Watch, build, compiled, frozen, generate, latents, prompt, ran_blocks, step

ALL = tiny.NUM_BLOCKS
FIRST = 1


def expected(model, text, noise, times=TIMES, **fields):
    return [record.output for record in tiny.reference(model, text, noise, times, **fields).records]


# A step that raises.


@pytest.fixture
def failing():
    """A function that makes the n-th following block raise once."""

    @contextlib.contextmanager
    def fail(error, at):
        Watch.ran, Watch.error, Watch.error_at = 0, error, at
        with pytest.raises(type(error), match="on demand"):
            yield
        assert Watch.ran == at
        Watch.error = None

    yield fail
    Watch.error = None


@pytest.mark.parametrize(
    "error", [RuntimeError("on demand"), KeyboardInterrupt("on demand")], ids=["error", "interrupt"]
)
@pytest.mark.parametrize(
    ("done", "at"),
    [
        pytest.param(0, 3, id="first-step"),
        pytest.param(2, 3, id="computed-step"),
        pytest.param(3, 1, id="reused-step"),
        pytest.param(2, 4, id="after-the-region"),
    ],
)
def test_a_step_that_raises_does_not_change_the_session(failing, error, done, at):
    fields = {"Bn_compute_blocks": 1}
    module, text, noise = compiled(build(), **fields), prompt(), latents()
    step(module, prompt(9), 1.0, noise)  # Compiled before a block fails.
    outputs = generate(module, text, noise, TIMES[:done])
    before = every_session(module)
    with failing(error, at):
        step(module, text, TIMES[done], noise)
    assert every_session(module) == before
    outputs += generate(module, text, noise, TIMES[done:])
    tiny.assert_bitwise(outputs, expected(build(), text, noise, **fields))
    assert every_session(module)[-1].num_steps == len(TIMES)


def test_a_first_step_of_a_new_generation_that_raises_does_not_end_the_old_one(failing):
    module, text, noise = compiled(build()), prompt(), latents()
    generate(module, text, noise, TIMES[:3])
    before = every_session(module)
    with failing(RuntimeError("on demand"), 3):
        step(module, text, 1.0, noise)
    assert every_session(module) == before
    assert ran_blocks(module, text, TIMES[3], noise) == FIRST


# Values and shapes that do not match the cached values.


def test_a_step_whose_diff_is_nan_is_computed():
    module, text, noise = compiled(build()), prompt(), latents()
    bad = noise.clone()
    bad[0, 0, 0] = torch.nan
    ran = [ran_blocks(module, text, t, x) for t, x in zip(TIMES, [noise, noise, bad, noise, noise], strict=False)]
    assert ran == [ALL, FIRST, ALL, ALL, FIRST]
    (stats,) = every_session(module)
    assert stats.decisions == ["warmup", "diff-below", "nan", "nan", "diff-below"]
    assert "0.050" in str(stats)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_a_change_of_size_in_a_session_forces_a_computed_step(dynamic):
    module, text, model = compiled(build(), dynamic=dynamic), prompt(), build()
    sizes = [6, 6, 9, 9, 6, 6, 6, 4]
    outputs, ran = [], []
    for timestep, tokens in zip(TIMES, sizes, strict=True):
        noise = latents(1, tokens=tokens)
        Watch.ran = 0
        outputs.append(step(module, text, timestep, noise))
        ran.append(Watch.ran)
        if ran[-1] == ALL:
            tiny.assert_bitwise([outputs[-1]], [step(model, text, timestep, noise)])
    assert ran == [ALL, FIRST, ALL, FIRST, ALL, FIRST, ALL, ALL]
    (stats,) = every_session(module)
    assert (stats.num_steps, stats.cached_steps) == (8, [1, 3, 5])


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_a_new_text_length_or_batch_size_in_a_named_request_forces_a_computed_step(dynamic):
    module, model = compiled(build(), dynamic=dynamic), build()
    shapes = [dict(length=5), dict(length=7), dict(batch=3), dict(length=5)]
    texts = [prompt(1, **shape) for shape in shapes]
    with cachedit_fx.session("request"):
        for timestep, text in zip(TIMES, texts, strict=False):
            noise = latents(1, batch=text.shape[0])
            tiny.assert_bitwise([step(module, text, timestep, noise)], [step(model, text, timestep, noise)])
    assert not any(stats.cached_steps for stats in every_session(module))


def test_a_change_of_dtype_in_a_session_forces_a_computed_step():
    class Casting(tiny.Transformer):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            dtype = self.proj_in.weight.dtype
            return super().forward(hidden_states.to(dtype), encoder_hidden_states.to(dtype), timestep)

    model, text, noise = frozen(Casting()), prompt(), latents()
    module = compiled(model)
    ran = [ran_blocks(module, text, timestep, noise) for timestep in TIMES[:2]]
    model.bfloat16()
    ran += [ran_blocks(module, text, timestep, noise) for timestep in TIMES[2:4]]
    assert ran == [ALL, FIRST, ALL, FIRST]
    assert len(every_session(module)) == 1


# Decisions.


@pytest.mark.parametrize("fields", [{}, {"Bn_compute_blocks": 1}, {"compile_blocks": "inline"}])
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_zero_or_less_matches_the_plain_model_bitwise(threshold, fields):
    module, model, text = compiled(build(), **{"residual_diff_threshold": threshold}, **fields), build(), prompt()
    tiny.assert_bitwise(generate(module, text, latents()), generate(model, text, latents()))
    assert every_session(module)[0].decisions == ["warmup", *["threshold-zero"] * 7]


def test_a_threshold_of_one_or_more_reuses_without_a_probe():
    module, text = compiled(build(), residual_diff_threshold=1.0), prompt()
    step(module, text, 1.0, latents(1))
    ran = [ran_blocks(module, text, timestep, latents(seed)) for seed, timestep in enumerate(TIMES[1:4], 5)]
    assert ran == [FIRST] * 3
    (stats,) = every_session(module)
    assert (stats.residual_diffs, stats.cached_steps) == ({}, [1, 2, 3])


def test_one_graph_serves_all_steps():
    module, text = compiled(build()), prompt()
    counters.clear()
    step(module, text, 1.0, latents())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            generate(module, text, latents(seed))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize(("regions", "allowed"), [("merged", 1), ("per_list", 2)])
def test_a_call_reads_from_the_device_once_per_region(regions, allowed, monkeypatch):
    module, text = compiled(frozen(tiny.TwoLists()), regions=regions), prompt()
    generate(module, text, latents(), TIMES[:2])
    counts = []

    def counted(read):
        def call(tensor, *args, **kwargs):
            counts[-1] += 1
            return read(tensor, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    for timestep in TIMES[2:]:
        counts.append(0)
        step(module, text, timestep, latents())
    counts.append(0)
    step(module, prompt(2), 1.0, latents())
    monkeypatch.undo()
    # The fingerprints of the new prompt and of the known one of the same shape are read to compare them. Nothing is
    # cached for the new one, so besides, only the timestep is read.
    assert counts == [allowed] * 6 + [3]
    assert every_session(module)[0].cached_steps


# Regions and pieces.


def test_every_list_can_have_its_own_decision():
    model, text, noise = frozen(tiny.TwoLists()), prompt(), latents()
    model.more[0].image.weight.mul_(0.02)  # Its residual depends little on its input.
    module = compiled(model, regions="per_list")
    ran, outputs = [], []
    for timestep in TIMES:
        Watch.ran = 0
        outputs.append(step(module, text, timestep, noise))
        ran.append(Watch.ran)
    first, second = every_session(module)
    assert [first.region, second.region] == ["blocks[1:3]", "more[1:3]"]
    assert first.session == second.session
    assert first.num_steps == second.num_steps == 8
    assert 0 < len(second.cached_steps) < 8
    assert first.cached_steps != second.cached_steps
    skipped = [2 * ((i in first.cached_steps) + (i in second.cached_steps)) for i in range(8)]
    assert ran == [6 - blocks for blocks in skipped]
    tiny.assert_bitwise(outputs, per_list_by_hand(model, text, noise))


def per_list_by_hand(model, text, noise):
    """The outputs of `TwoLists`, with each list cached separately."""
    stored, outputs = {}, []
    for number, timestep in enumerate(TIMES):
        scale = torch.full((tiny.BATCH, 1, 1), 1 + timestep)
        x = model.proj_in(noise)
        for blocks, gain in ((model.blocks, scale), (model.more, torch.ones_like(scale))):
            after = blocks[0](x, text, gain)
            now, (old, added) = after - x, stored.get(blocks, (None, None))
            if number and (now - old).abs().mean() / old.abs().mean() < tiny.fields()["residual_diff_threshold"]:
                x = after + added
                continue
            x = blocks[2](blocks[1](after, text, gain), text, gain)
            stored[blocks] = now, x - after
        outputs.append(model.proj_out(x))
    return outputs


@pytest.mark.parametrize("fields", [{}, {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}])
@pytest.mark.parametrize("compile_blocks", ["once", "inline"])
def test_blocks_compiled_once_or_inline_give_the_outputs_of_the_reference(compile_blocks, fields):
    module, text, noise = compiled(build(), compile_blocks=compile_blocks, **fields), prompt(), latents()
    tiny.assert_bitwise(generate(module, text, noise), expected(build(), text, noise, **fields))
    assert 0 < len(every_session(module)[0].cached_steps) < 8


# Tensors.


def test_a_cached_value_is_passed_in_the_layout_that_the_graph_expects():
    stored = torch.arange(6.0).reshape(2, 3)
    assert in_layout(stored, (3, 1)) is stored
    other = in_layout(stored, (1, 2))
    assert other.stride() == (1, 2)
    assert torch.equal(other, stored)


@pytest.mark.parametrize("fields", [{}, {"Bn_compute_blocks": 1}], ids=["F1B0", "F1B1"])
@pytest.mark.parametrize("compile_blocks", ["once", "inline"])
@pytest.mark.parametrize("make", [build, lambda: frozen(tiny.Bare())], ids=["projected", "bare"])
def test_a_cached_value_aliases_neither_inputs_nor_outputs(make, compile_blocks, fields):
    model = make()
    width = 4 if isinstance(model, tiny.Transformer) else tiny.WIDTH
    noise = latents().repeat(1, 1, width // 4)
    text = prompt() if width == 4 else torch.randn(2, tiny.TEXT, tiny.WIDTH)
    wanted = expected(model, text, noise, **fields)
    module, outputs = compiled(model, compile_blocks=compile_blocks, **fields), []
    for timestep in TIMES:
        given, times = noise.clone(), torch.full((2,), timestep)
        results = module(hidden_states=given, encoder_hidden_states=text, timestep=times)
        outputs.append(results[0].clone())
        for tensor in (given, times, *results):
            tensor.fill_(7.0)
    tiny.assert_bitwise(outputs, wanted)
    assert 0 < len(every_session(module)[0].cached_steps) < 8


def test_a_bfloat16_model_decides_in_float32():
    model, text, noise = build().bfloat16(), prompt().bfloat16(), latents().bfloat16()
    wanted = tiny.reference(model, text, noise)
    module = compiled(build().bfloat16())
    tiny.assert_bitwise(generate(module, text, noise), [record.output for record in wanted.records])
    (stats,) = every_session(module)
    assert stats.decisions == [record.reason for record in wanted.records]
    diffs = {record.step: record.diff for record in wanted.records if record.diff is not None}
    assert stats.residual_diffs == pytest.approx(diffs, rel=1e-6)  # The same bfloat16 residuals, compared in float32.
    assert any(torch.tensor(diff).bfloat16().item() != diff for diff in stats.residual_diffs.values())
    assert stats.state_bytes == (2 * tiny.STREAM_BYTES + tiny.TEXT_BYTES) // 2


def test_integers_can_be_timesteps():
    module, text = compiled(build()), prompt()
    ran = []
    for timestep in (20, 19, 18, 17):
        Watch.ran = 0
        module(hidden_states=latents(), encoder_hidden_states=text, timestep=torch.full((2,), timestep))
        ran.append(Watch.ran)
    assert ran == [ALL, FIRST, ALL, FIRST]  # The diffs are 1/21, 2/21 and 1/19.


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param([torch.no_grad], id="no_grad"),
        pytest.param([torch.inference_mode], id="inference_mode"),
        pytest.param([torch.inference_mode, torch.no_grad, torch.enable_grad], id="in-turn"),
    ],
)
def test_the_grad_mode_does_not_affect_a_session(modes):
    module, text, noise = compiled(build()), prompt(), latents()
    outputs = []
    for i, timestep in enumerate(TIMES):
        with modes[i % len(modes)]():
            outputs.append(step(module, text, timestep, noise))
    with torch.no_grad():
        tiny.assert_bitwise([o.clone() for o in outputs], expected(build(), text, noise))
    assert len(every_session(module)) == 1


def test_decisions_and_outputs_under_autocast_match_the_reference():
    text, noise = prompt(), latents().bfloat16()  # The stream is bfloat16 from the start, as in real models.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module = compiled(build())
        tiny.assert_bitwise(generate(module, text, noise), expected(build(), text, noise))
    assert 0 < len(every_session(module)[0].cached_steps) < 8


def test_a_model_without_timesteps_is_cached_only_in_named_requests():
    class Untimed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, hidden_states, encoder_hidden_states):
            return self.inner(hidden_states, encoder_hidden_states, torch.ones(2))

    module, text = compiled(frozen(Untimed())), prompt()
    Watch.ran = 0
    for _ in range(3):
        module(hidden_states=latents(), encoder_hidden_states=text)
    assert Watch.ran == 3 * ALL
    Watch.ran = 0
    with cachedit_fx.session("request"):
        for _ in range(3):
            module(hidden_states=latents(), encoder_hidden_states=text)
    assert Watch.ran == ALL + 2 * FIRST
