"""The settings of a user, the errors about wrong ones, and every way to reach the backend."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import Backend, CacheConfig
from cachedit_fx.config.cache_config import FIELD_NAMES, OPTION_NAMES, split_options
from cachedit_fx.errors import ConfigError, listed
from cachedit_fx.forecasters import FoCaCalibratorConfig
from tests import tiny
from tests.sessions import every_session

# CacheConfig.


def test_defaults_of_every_field():
    config = CacheConfig()
    assert {name: getattr(config, name) for name in FIELD_NAMES} == dict(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.2,
        max_warmup_steps=None,
        warmup_interval=1,
        max_cached_steps=-1,
        max_continuous_cached_steps=-1,
        max_accumulated_residual_diff_threshold=None,
        start_percent=0.0,
        end_percent=1.0,
        final_compute_steps=0,
        num_inference_steps=None,
        steps_computation_mask=None,
        steps_computation_policy="dynamic",
        force_refresh_step_hint=None,
        force_refresh_step_policy="once",
        enable_separate_cfg=None,
        cfg_compute_first=False,
        cfg_diff_compute_separate=True,
        cache_type="DBCache",
        enable_dynamic_prune_threshold=False,
        max_dynamic_prune_threshold=None,
        dynamic_prune_threshold_relax_ratio=1.25,
        non_prune_block_ids=(),
        inner_backend="inductor",
        on_no_match="fallback",
        regions="merged",
        compile_blocks="once",
        mode=None,
        forecaster=FoCaCalibratorConfig(),
        reach="blocks",
        probe="fn_residual",
        batch_decision="mean",
        decision_rule="threshold",
        rescale_coefficients=(),
        magnitude_ratios=(),
        decider=None,
        guidance_reuse="off",
        max_continuous_guidance_steps=-1,
        guidance_computation_mask=None,
        guidance_reuse_threshold=None,
        fast_dispatch=True,
        shadow=False,
        debug_dir=None,
        cache_device=None,
        max_state_bytes=4 * 1024**3,
    )


def test_a_config_cannot_be_changed():
    config = CacheConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Fn_compute_blocks = 1
    assert config == CacheConfig()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("Fn_compute_blocks", -1, "an int >= 0"),
        ("Fn_compute_blocks", 1.0, "an int >= 0"),
        ("Fn_compute_blocks", True, "an int >= 0"),
        ("Fn_compute_blocks", "1", "an int >= 0"),
        ("Fn_compute_blocks", None, "an int >= 0"),
        ("Bn_compute_blocks", -1, "an int >= 0"),
        ("max_warmup_steps", -1, "an int >= 0"),
        ("warmup_interval", 0, "an int >= 1"),
        ("warmup_interval", 2.0, "an int >= 1"),
        ("max_cached_steps", -2, "an int >= -1"),
        ("max_continuous_cached_steps", -2, "an int >= -1"),
        ("max_continuous_cached_steps", None, "an int >= -1"),
        ("residual_diff_threshold", math.nan, "a finite number"),
        ("residual_diff_threshold", math.inf, "a finite number"),
        ("residual_diff_threshold", "0.1", "a finite number"),
        ("residual_diff_threshold", None, "a finite number"),
        ("residual_diff_threshold", False, "a finite number"),
        ("max_accumulated_residual_diff_threshold", math.nan, "a finite number"),
        ("max_accumulated_residual_diff_threshold", [0.1], "a finite number"),
        ("inner_backend", 3, "a backend of torch.compile other than 'cachedit'"),
        ("inner_backend", "inductr", "'inductor'"),
        ("inner_backend", "cachedit", "'inductor'"),
        ("on_no_match", "ignore", "'fallback', 'raise'"),
        ("regions", None, "'merged', 'per_list'"),
        ("compile_blocks", "twice", "'once', 'inline'"),
        ("mode", "fast", "'max-autotune'"),
    ],
)
def test_an_invalid_value_raises_an_error_with_the_field_and_the_allowed_values(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**{field: value})
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.startswith(f"cachedit_fx: {field} must be ")
    assert f"got {value!r}" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual_diff_threshold", 0),
        ("residual_diff_threshold", -1.0),
        ("residual_diff_threshold", 2),
        ("max_accumulated_residual_diff_threshold", 0.5),
        ("max_cached_steps", 0),
        ("max_continuous_cached_steps", 0),
        ("max_warmup_steps", 0),
        ("mode", "default"),
        ("mode", "max-autotune-no-cudagraphs"),
        ("inner_backend", "aot_eager"),
    ],
)
def test_values_at_the_edge_are_allowed(field, value):
    assert getattr(CacheConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "near"), [("regions", "per-list", "per_list"), ("mode", "defalt", "default")]
)
def test_a_misspelled_choice_raises_an_error_with_the_nearest_one(field, value, near):
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {near!r}?")):
        CacheConfig(**{field: value})


# Options.


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("residual_diff_treshold", "residual_diff_threshold"),
        ("Fn_blocks", "Fn_compute_blocks"),
        ("fn_compute_blocks", "Fn_compute_blocks"),
        ("max_warmup_step", "max_warmup_steps"),
        ("max_continous_cached_steps", "max_continuous_cached_steps"),
        ("max_autotun", "max_autotune"),
    ],
)
def test_an_unknown_option_raises_an_error_with_the_nearest_name(option, nearest):
    with pytest.raises(ConfigError) as caught:
        split_options({option: 0.1})
    message = str(caught.value)
    assert message.startswith(f"cachedit_fx: option {option!r} (given 0.1) is unknown. Did you mean {nearest!r}?")
    assert all(name in message for name in OPTION_NAMES)


def test_no_option_is_suggested_if_none_is_similar():
    with pytest.raises(ConfigError) as caught:
        split_options({"zzz": 1})
    assert "'zzz' (given 1) is unknown.\nAllowed: Fn_compute_blocks, " in str(caught.value)


def test_only_the_options_of_inductor_are_passed_on():
    options = {"Fn_compute_blocks": 2, "max_autotune": True, "triton.cudagraphs": False}
    config, rest = split_options(options)
    assert config == CacheConfig(Fn_compute_blocks=2)
    assert rest == {"max_autotune": True, "triton.cudagraphs": False}


def test_options_of_inductor_are_unknown_to_another_inner_backend():
    with pytest.raises(ConfigError, match=r"option 'max_autotune' \(given True\) is unknown"):
        split_options({"max_autotune": True, "inner_backend": "eager"})


def test_options_override_a_config():
    config, _ = split_options({"max_warmup_steps": 2}, CacheConfig(Fn_compute_blocks=3))
    assert config == CacheConfig(Fn_compute_blocks=3, max_warmup_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"residual_diff_treshold": 0.1, "inner_backend": "eager"},
            "cachedit_fx: option 'residual_diff_treshold' (given 0.1) is unknown. "
            f"Did you mean 'residual_diff_threshold'?\n{listed([f'Allowed: {OPTION_NAMES[0]}', *OPTION_NAMES[1:]])}.",
            id="unknown",
        ),
        pytest.param(
            {"Fn_compute_blocks": "1"},
            "cachedit_fx: Fn_compute_blocks must be an int >= 0, got '1'",
            id="ill-typed",
        ),
    ],
)
def test_torch_compile_shows_the_whole_error_about_an_option(options, message):
    module = torch.compile(tiny.build(), backend="cachedit", options=options)
    with pytest.raises(BackendCompilerFailed) as caught:
        tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert f"backend='cachedit' raised:\nConfigError: {message}" in str(caught.value)
    assert isinstance(caught.value.inner_exception, ConfigError)


def test_a_wrong_option_of_backend_raises_an_error_at_once():
    with pytest.raises(ConfigError, match="Did you mean 'max_warmup_steps'"):
        Backend(options={"max_warmup_step": 1})


# Backend.


def test_backends_are_equal_if_all_of_their_settings_are():
    one = Backend(CacheConfig(Fn_compute_blocks=1), mode="default", options={"max_autotune": True})
    same = Backend(mode="default", options={"max_autotune": True, "Fn_compute_blocks": 1})
    assert one == same
    assert hash(one) == hash(same)
    for other in (
        Backend(CacheConfig(Fn_compute_blocks=2), mode="default", options={"max_autotune": True}),
        Backend(CacheConfig(Fn_compute_blocks=1), options={"max_autotune": True}),
        Backend(CacheConfig(Fn_compute_blocks=1), mode="default", options={"max_autotune": False}),
        "cachedit",
    ):
        assert one != other


def test_an_equal_backend_does_not_recompile():
    module = tiny.build()
    first = tiny.compiled(module)
    tiny.step(first, tiny.prompt(), 1.0, tiny.latents())
    counters.clear()
    again = tiny.compiled(module)
    tiny.step(again, tiny.prompt(), 1.0, tiny.latents())
    assert counters["stats"]["unique_graphs"] == 0


# Every way to reach the backend.


def assert_reuses(module):
    """Asserts that every other step is reused, which also shows that the backend was called."""
    outputs = tiny.generate(module, tiny.prompt(), tiny.latents())
    assert every_session(module)[-1].cached_steps == [1, 3, 5, 7]
    expected = tiny.reference(tiny.build(), tiny.prompt(), tiny.latents())
    tiny.assert_bitwise(outputs, [record.output for record in expected.records])


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_the_backend_is_found_by_its_name(fullgraph, dynamic):
    options = tiny.fields(inner_backend="eager")
    module = torch.compile(tiny.build(), backend="cachedit", options=options, fullgraph=fullgraph, dynamic=dynamic)
    assert_reuses(module)


def test_a_module_can_be_compiled_in_place():
    module = tiny.build()
    module.compile(backend="cachedit", options=tiny.fields(inner_backend="eager"), fullgraph=True)
    assert_reuses(module)


def test_a_function_around_the_module_can_be_compiled():
    module = tiny.build()

    @torch.compile(backend=Backend(tiny.config()), fullgraph=True)
    def call(**inputs):
        return module(**inputs)

    outputs = tiny.generate(call, tiny.prompt(), tiny.latents())
    assert every_session(module)[-1].cached_steps == [1, 3, 5, 7]
    expected = tiny.reference(tiny.build(), tiny.prompt(), tiny.latents())
    tiny.assert_bitwise(outputs, [record.output for record in expected.records])


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"mode": "max-autotune-no-cudagraphs"}, id="mode-alone"),
        pytest.param({"options": {"mode": "max-autotune-no-cudagraphs", "Fn_compute_blocks": 1}}, id="as-an-option"),
    ],
)
def test_a_mode_reaches_the_inner_compiler(way, monkeypatch):
    received = []
    monkeypatch.setattr(
        torch,
        "_TorchCompileInductorWrapper",
        lambda mode, options, dynamic: received.append((mode, options)) or Spy(),
    )

    class Spy:
        config = {}  # noqa: RUF012 The wrapper has one as well.

        def __call__(self, gm, example_inputs):
            return gm.forward

    module = torch.compile(tiny.build(num_blocks=9), backend="cachedit", fullgraph=True, **way)
    tiny.step(module, tiny.prompt(), 1.0, tiny.latents())
    assert received == [("max-autotune-no-cudagraphs", {})]
    assert cachedit_fx.is_cached(module)


def test_mode_beside_options_is_refused_by_torch_itself():
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(tiny.build(), backend="cachedit", mode="max-autotune", options={"Fn_compute_blocks": 1})


def test_the_cached_region_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="cachedit_fx"):
        tiny.step(tiny.compiled(tiny.build()), tiny.prompt(), 1.0, tiny.latents())
    assert "region blocks[1:4]; timestep timestep, conditioning encoder_hidden_states" in caplog.text


def test_a_new_process_need_not_import_the_package():
    code = """
import sys, torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(10))

    def forward(self, hidden_states, timestep):
        hidden_states = hidden_states * timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

assert "cachedit_fx" not in sys.modules
torch.set_grad_enabled(False)
model = Model().eval()
compiled = torch.compile(model, backend="cachedit"OPTIONS)
x = torch.randn(2, 3, 8)
torch.testing.assert_close(compiled(x, torch.ones(1)), model(x, torch.ones(1)))
from cachedit_fx import is_cached
assert is_cached(model)
print("cached")
"""
    options = ', options={"inner_backend": "eager"}'
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("OPTIONS", options)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "cached\n"), run.stderr


@pytest.mark.slow
def test_the_backend_needs_no_options():
    module = torch.compile(tiny.build(num_blocks=10), backend="cachedit")
    plain = tiny.build(num_blocks=10)
    prompt, latents = tiny.prompt(), tiny.latents()
    for timestep in (1.0, 0.9):
        # Fused float32 kernels round differently; the outputs are about 10.
        torch.testing.assert_close(
            tiny.step(module, prompt, timestep, latents),
            tiny.step(plain, prompt, timestep, latents),
            rtol=1e-5,
            atol=1e-4,
        )
    (stats,) = every_session(module)
    assert stats.region == "blocks[1:10]"
    assert stats.decisions == ["warmup", "warmup"]
