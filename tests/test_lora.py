"""LoRA adapters are loaded, changed and unloaded on a transformer with the cache enabled, also during a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import cachedit_fx
from tests.tiny_pipelines import PIPELINES

FLUX = PIPELINES["flux"]
STEPS = 6


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> str:
    return saved(str(tmp_path_factory.mktemp("lora")), seed=3)


@pytest.fixture(scope="module")
def other_lora(tmp_path_factory) -> str:
    return saved(str(tmp_path_factory.mktemp("other_lora")), seed=4)


def saved(folder: str, seed: int) -> str:
    """A folder with LoRA weights, as `save_lora_weights` writes them."""
    pipe = FLUX.build(2)
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def run(pipe: FluxPipeline) -> Tensor:
    return FLUX.run(pipe, num_steps=STEPS)


def test_lora_weights_load_scale_and_unload_as_without_the_cache(lora):
    plain, pipe = FLUX.build(2), FLUX.build(2)
    fields = dict(Fn_compute_blocks=1, residual_diff_threshold=0.0, inner_backend="eager")
    cachedit_fx.enable_cache(pipe, **fields)
    expected = {}
    for case, change in {
        "none": lambda pipe: None,
        "loaded": lambda pipe: pipe.load_lora_weights(lora, adapter_name="style"),
        "scaled": lambda pipe: pipe.set_adapters("style", 0.5),
        "off": lambda pipe: pipe.disable_lora(),
        "unloaded": lambda pipe: pipe.unload_lora_weights(),
    }.items():
        change(plain)
        change(pipe)
        expected[case] = run(plain)
        torch.testing.assert_close(
            run(pipe), expected[case], rtol=0, atol=0, msg=lambda text, case=case: f"{case}: {text}"
        )
        assert list(pipe.transformer.state_dict()) == list(plain.transformer.state_dict())
        (stats,) = cachedit_fx.summary(pipe, logging=False)
        assert stats.num_steps == STEPS
    assert not torch.equal(expected["loaded"], expected["none"])
    assert not torch.equal(expected["scaled"], expected["loaded"])
    assert torch.equal(expected["unloaded"], expected["none"])
    cachedit_fx.disable_cache(pipe)
    torch.testing.assert_close(run(pipe), expected["none"], rtol=0, atol=0)


def test_steps_are_also_reused_with_lora_weights(lora):
    pipe = FLUX.build(2)
    cachedit_fx.enable_cache(
        pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0, max_warmup_steps=3, inner_backend="eager"
    )
    pipe.load_lora_weights(lora)
    run(pipe)
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    assert stats.cached_steps == [3, 4, 5]


def changes(lora: str, other: str) -> dict[str, Callable[[FluxPipeline], object]]:
    """What diffusers offers for adapters."""
    return {
        "load": lambda pipe: pipe.load_lora_weights(lora, adapter_name="a"),
        "weight": lambda pipe: pipe.set_adapters("a", 0.5),
        "another weight": lambda pipe: pipe.set_adapters("a", 0.7),  # Dynamo makes the number an input of the graph.
        "load another": lambda pipe: pipe.load_lora_weights(other, adapter_name="b"),
        "swap": lambda pipe: pipe.set_adapters("b"),
        "delete": lambda pipe: pipe.delete_adapters("b"),
        "hot-swap": lambda pipe: pipe.load_lora_weights(other, adapter_name="a", hotswap=True),
        "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.5),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }


def run_with_changes(pipe: FluxPipeline, lora: str, other: str) -> list[Tensor]:
    """The latents after each step. There is a change after every third step."""
    todo, latents = [*changes(lora, other).values()], []

    def after_step(pipe: FluxPipeline, step: int, _timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"].clone())
        if step % 3 == 2 and todo:
            todo.pop(0)(pipe)
        return {}

    FLUX.run(pipe, num_steps=3 * len(todo) + 3, callback_on_step_end=after_step)
    return latents


@pytest.mark.slow
def test_no_residual_of_earlier_adapters_is_reused_after_a_change(lora, other_lora):
    plain, pipe = FLUX.build(2), FLUX.build(2)
    fields = dict(Fn_compute_blocks=1, max_warmup_steps=1, forecaster=None, inner_backend="eager", on_no_match="raise")
    cachedit_fx.enable_cache(pipe, residual_diff_threshold=0.0, **fields)
    expected, found = run_with_changes(plain, lora, other_lora), run_with_changes(pipe, lora, other_lora)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, step=step: f"step {step}: {text}")
    cachedit_fx.enable_cache(pipe, residual_diff_threshold=1e6, **fields)
    run_with_changes(pipe, lora, other_lora)
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    computed = [step for step in range(stats.num_steps) if step not in stats.cached_steps]
    assert computed == [*range(0, stats.num_steps, 3)]  # The first step, and the one after each change.


def test_adapters_can_be_hot_swapped_without_a_new_graph(lora, other_lora):
    """PEFT requires that the first adapter is loaded before the transformer is compiled."""
    plain, pipe = FLUX.build(2), FLUX.build(2)
    for one in (plain, pipe):
        one.enable_lora_hotswap(target_rank=4)
        one.load_lora_weights(lora, adapter_name="style")
    cachedit_fx.enable_cache(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0, inner_backend="eager")
    assert torch.equal(run(pipe), run(plain))
    for one in (plain, pipe):
        one.load_lora_weights(other_lora, adapter_name="style", hotswap=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(pipe), run(plain))


def test_a_transformer_without_the_cache_has_its_own_methods_for_adapters():
    pipe = FLUX.build(2)
    cachedit_fx.enable_cache(pipe, inner_backend="eager")
    assert "set_adapters" in vars(pipe.transformer)
    cachedit_fx.disable_cache(pipe)
    assert not {"set_adapters", "fuse_lora"} & vars(pipe.transformer).keys()
