"""docs/from-diffusers.md is correct: it names every cache of diffusers, and its configuration is that of TeaCache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers.hooks
import numpy as np
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.policies import Budget
from tests.tiny_pipelines import PIPELINES

TEXT = (Path(__file__).parents[1] / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
NUM_STEPS = 10
OTHER_HOOKS = {"LayerSkipConfig", "SmoothedEnergyGuidanceConfig"}  # They change the guidance, and cache nothing.


def test_the_page_names_every_cache_of_diffusers():
    exported = {name for name in vars(diffusers.hooks) if re.fullmatch(r"[A-Z]\w+Config", name)} - OTHER_HOOKS
    listed = set(re.findall(r"^\| `(\w+Config)` \|", TEXT, re.MULTILINE))
    assert exported >= {"FirstBlockCacheConfig", "FasterCacheConfig"}
    assert listed == exported


class TeaCache:
    """TeaCache for a transformer of FLUX, as its authors publish it (`TeaCache4FLUX/teacache_flux.py`)."""

    def __init__(self, transformer: nn.Module, threshold: float, coefficients: Sequence[float]) -> None:
        self.threshold, self.rescale = threshold, np.poly1d(coefficients) if len(coefficients) else lambda x: x
        self.before: Tensor | None = None
        self.residual: Tensor | None = None
        self.total, self.step, self.reused = 0.0, 0, list[int]()
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for number, block in enumerate(blocks):
            block.forward = self.forward_of(block, block.forward, number == 0, number == len(blocks) - 1)

    def forward_of(self, block: nn.Module, forward: Any, is_first: bool, is_last: bool) -> Any:
        def run(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **kwargs: Any) -> Any:
            if is_first:
                self.entered = hidden_states
                self.decide(block.norm1(hidden_states, emb=temb)[0])
            if self.reuses:
                return encoder_hidden_states, self.entered + self.residual
            found = forward(hidden_states, encoder_hidden_states, temb, **kwargs)
            if is_last:
                self.residual = found[1] - self.entered
            return found

        return run

    def decide(self, modulated: Tensor) -> None:
        if self.step in (0, NUM_STEPS - 1):
            self.reuses, self.total = False, 0.0
        else:
            change = (modulated - self.before).abs().mean() / self.before.abs().mean()
            self.total += self.rescale(change.item())
            self.reuses = bool(self.total < self.threshold)
            self.total = self.total if self.reuses else 0.0
        self.reused += [self.step] * self.reuses
        self.before, self.step = modulated, self.step + 1


def test_the_configuration_for_teacache_gives_its_latents():
    threshold, coefficients = 0.12, (0.5, 0.25, 0.01)
    entry = PIPELINES["flux"]
    theirs, ours = entry.build(), entry.build()
    (shown,) = re.findall(r"```python\n(from cachedit_fx import CacheConfig\n.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"pipe": ours}
    exec(shown.replace("cachedit_fx.enable_cache(pipe, config)", ""), {}, names)
    config = names["config"].override(policy=Budget(threshold, coefficients=coefficients), inner_backend="eager")
    with torch.no_grad():
        cache = TeaCache(theirs.transformer, threshold, coefficients)
        expected = entry.run(theirs, num_steps=NUM_STEPS)
        cachedit_fx.enable_cache(ours, config)
        found = entry.run(ours, num_steps=NUM_STEPS)
    (stats,) = cachedit_fx.summary(ours, logging=False)
    assert stats.cached_steps == cache.reused
    assert 0 < len(cache.reused) < NUM_STEPS - 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
