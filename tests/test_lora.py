"""LoRA adapters are loaded and unloaded on a transformer with the cache enabled."""

from __future__ import annotations

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
    """A folder with LoRA weights, as `save_lora_weights` writes them."""
    folder = str(tmp_path_factory.mktemp("lora"))
    pipe = FLUX.build(2)
    torch.manual_seed(3)
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
