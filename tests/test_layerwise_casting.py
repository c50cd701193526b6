"""Layerwise casting of diffusers: the casts are operations of the graph, so the hooks on the layers are not needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.inspect import CallCounts
from tests import tiny
from tests.idle import CALLS, counts, enabled, run
from tests.tiny import build, config, latents, prompt

FP8 = torch.float8_e4m3fn


def cast(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    apply_layerwise_casting(model, storage_dtype=FP8, compute_dtype=compute_dtype)
    return model


def rounded(model: nn.Module) -> nn.Module:
    """The model with the weights that a cast to fp8 and back leaves. diffusers casts no layer of these two names."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("proj_in", "proj_out")):
            parameter.data = parameter.data.to(FP8).to(parameter.dtype)
    return model


def assert_is_cached(model: Any, **others: Any) -> None:
    outputs = run(model)
    tiny.assert_bitwise(outputs[::2], run(cast(build()))[::2])
    tiny.assert_bitwise(outputs, run(enabled(rounded(build()), **others)))
    assert counts(model) == CallCounts(computed=4, reused=4) and cachedit_fx.is_cached(model)


def test_a_model_that_was_cast_before_is_cached():
    model = enabled(cast(build()))
    assert_is_cached(model)
    assert model._compiled_call_impl.fast_dispatch.reason == ""  # No hook is left.
    assert model.blocks[0].image.weight.dtype == FP8


def test_a_model_that_is_cast_after_it_ran_with_the_cache_is_cached_again():
    model = enabled()
    run(model, seed=2)
    cast(model)
    cachedit_fx.reset(model)
    assert_is_cached(model)


def test_the_hooks_are_back_after_disable_cache():
    model = cast(build())
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    enabled(model)
    run(model)
    assert vars(model.proj_text)["forward"] is not before["proj_text"]
    cachedit_fx.disable_cache(model)
    assert all(vars(module).get("forward") is before[name] for name, module in model.named_modules())
    tiny.assert_bitwise(run(model), run(cast(build())))


def test_a_copy_casts_its_own_weights():
    model = enabled(cast(build()))
    run(model)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter.data)
    assert_is_cached(other)


class Layers(tiny.Transformer):
    """Has one layer of every kind that is cast, on the way to the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny.TOKENS, 4, max_norm=None)
        self.conv = nn.Conv1d(tiny.TOKENS, tiny.TOKENS, 3, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose2d(1, 1, 3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        hidden_states = hidden_states + self.table(torch.arange(tiny.TOKENS))
        hidden_states = self.conv(hidden_states) + self.transposed(hidden_states[:, None])[:, 0]
        return super().forward(hidden_states, **others)


def test_every_kind_of_layer_computes_with_cast_weights():
    torch.manual_seed(0)
    plain = tiny.frozen(Layers())
    model = enabled(cast(copy.deepcopy(plain), torch.float32))
    tiny.assert_bitwise(run(model)[::2], run(cast(plain))[::2])
    assert counts(model) == CallCounts(computed=4, reused=4)


def test_explain_captures_the_casts_and_leaves_the_hooks_in_place():
    model = cast(build())
    before = vars(model.proj_text)["forward"]
    inputs = dict(hidden_states=latents(), encoder_hidden_states=prompt(), timestep=torch.ones(2))
    assert "captured whole, 1 graph, 1 cached" in str(cachedit_fx.explain(model, **inputs, cache_config=config()))
    assert vars(model.proj_text)["forward"] is before


@pytest.mark.parametrize("on_no_match", ["fallback", "raise"])
def test_a_cast_of_a_whole_block_is_named_and_runs_with_its_hook(on_no_match):
    def prepared() -> nn.Module:
        model = build()
        apply_layerwise_casting_hook(model.blocks[2], FP8, torch.float32, non_blocking=False)
        return model

    model = enabled(prepared(), on_no_match=on_no_match)
    if on_no_match == "raise":
        with pytest.raises(cachedit_fx.NoMatchError, match="layerwise_casting on its layers"):
            run(model)
        return
    tiny.assert_bitwise(run(model), run(prepared()))
    ((reason, count),) = counts(model).reasons.items()
    assert "layerwise_casting" in reason and count == CALLS
