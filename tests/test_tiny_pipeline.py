"""`tiny_pipeline` returns pipelines that run as those of diffusers do, and that need no download."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from cachedit_fx.testing import tiny_pipeline
from cachedit_fx.testing.tiny_pipelines import KINDS

CALLS = {"flux": 1, "qwen": 2, "wan": 2, "wan2.2": 2}
"""Calls of a transformer per step."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a tiny pipeline opens a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_pipeline_makes_an_image_or_a_video_of_a_prompt(name: str):
    pipe = tiny_pipeline(name)
    calls = dict.fromkeys(KINDS[name].transformers, 0)
    for part in calls:
        pipe.components[part].register_forward_pre_hook(
            lambda *_, part=part: calls.update({part: calls[part] + 1})  # type: ignore[misc]
        )
    images = np.asarray(pipe("a cat", num_inference_steps=4, output_type="np")[0])
    assert images.shape == ((1, 5, 64, 64, 3) if "wan" in name else (1, 64, 64, 3))
    assert np.isfinite(images).all() and images.std() > 0.01
    assert sum(calls.values()) == 4 * CALLS[name] and all(calls.values())


def test_the_class_of_a_tiny_pipeline_is_that_of_diffusers_with_smaller_defaults():
    pipe = tiny_pipeline("wan")
    assert isinstance(pipe, diffusers.WanPipeline) and type(pipe).__name__ == "WanPipeline"
    defaults = {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items()}
    assert (defaults["height"], defaults["num_frames"], defaults["guidance_scale"]) == (64, 5, 5.0)
    video = pipe(prompt="a cat", num_inference_steps=1, height=32, num_frames=1, output_type="np").frames
    assert video.shape == (1, 1, 32, 64, 3)


def test_a_tiny_pipeline_reads_its_prompt():
    pipe = tiny_pipeline("flux")

    def latents(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent")[0]

    assert torch.equal(latents("a cat"), latents("a cat"))
    assert not torch.equal(latents("a cat"), latents("a dog"))


def test_the_weights_of_a_tiny_pipeline_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = tiny_pipeline("wan2.2"), tiny_pipeline("wan2.2"), tiny_pipeline("wan2.2", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for part in ("transformer", "transformer_2", "text_encoder", "vae"):
        weights, equal, different = (next(iter(p.components[part].parameters())) for p in (one, same, other))
        assert torch.equal(weights, equal) and not torch.equal(weights, different)


def test_a_tiny_pipeline_has_the_number_of_blocks_that_was_asked_for():
    transformer = tiny_pipeline("flux", num_blocks=2).transformer
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (2, 2)
