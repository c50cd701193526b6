"""Models whose code cache-dit patches are cached here without a functor, as docs/functors.md describes.

`tests/test_zoo.py` tests that they are cached, and in which lists; it also tests the rows of docs/models.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.cache_factory import patch_functors
from tests.models import noise
from tests.zoo import VARIANTS
from tests.zoo.runs import DECISIONS, SETTINGS
from tests.zoo.table import PAGE as MODELS
from tests.zoo.variant import Variant

PAGE = (Path(__file__).parent.parent / "docs" / "functors.md").read_text(encoding="utf-8")
FN = 1
PATCHED = (
    "Flux",
    "Chroma",
    "DiT",
    "LTX2",
    "QwenImageControlNet",
    "WanVACE",
    "GlmImage",
    "ErnieImage",
    "Cosmos3Omni",
    "HunyuanDiT",
    "BriaFibo",
    "ZImageControlNet",
)

every_model = pytest.mark.parametrize("variant", [VARIANTS[name] for name in PATCHED], ids=PATCHED)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rows() -> dict[str, list[str]]:
    """Name of a transformer -> the other cells of its row in the page's table."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.findall(r"`(\w+)`", first)[0]: others for first, *others in cells}


def test_the_page_lists_these_models_and_those_with_a_functor():
    needed = {name: re.findall(r"`(\w+)`", here) for name, (_, here, _) in rows().items() if here != "nothing"}
    assert {name for name in rows() if name not in needed} == {VARIANTS[name].kind.__name__ for name in PATCHED}
    assert {functor for (functor, *_) in needed.values()} == set(patch_functors.__all__)


@every_model
def test_the_page_names_the_lists_that_are_found_and_the_patterns_that_they_match(variant: Variant):
    listed = re.findall(r"`(\w+)` (\d(?: or \d)?)", rows()[variant.kind.__name__][-1])
    (row,) = re.findall(rf"^\| {variant.name} \(.*$", MODELS.read_text(encoding="utf-8"), re.MULTILINE)
    lists = re.findall(r"`(\w+)` \(\d+\): pattern (\d(?: or \d)?) ", row)
    assert listed == lists and [path for path, _ in lists] == [*variant.lists]
    assert "Functor" not in row


class LatticeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        mean = a.mean(1, keepdim=True) + b.mean(1, keepdim=True)
        return a + gain * self.linear(a + mean).tanh(), b + gain * self.text(b + mean).tanh()


class LatticeTransformer(nn.Module):
    """The transformer of the example in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LatticeBlock() for _ in range(4))

    def gain(self, timestep: Tensor) -> float:
        return float(np.log1p(timestep.numpy()).max())

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        gain = self.gain(timestep)
        a, b = hidden_states, encoder_hidden_states
        for block in self.blocks:
            a, b = block(a, b, gain)
        return (a + b.mean(1, keepdim=True),)


def test_the_example_of_the_page_makes_its_transformer_cacheable_and_can_be_undone():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    transformer = LatticeTransformer().eval().requires_grad_(False)
    inputs = dict(hidden_states=noise(2, 6, 8, seed=1), encoder_hidden_states=noise(2, 5, 8, seed=1))
    calls = [inputs | dict(timestep=torch.tensor([time])) for time in (0.9, 0.8, 0.7)]
    uncached = [transformer(**call)[0] for call in calls]
    before = dict(transformer.__dict__)
    names: dict[str, Any] = {"transformer": transformer}
    exec(compile(code, "functors.md", "exec"), names)
    cachedit_fx.enable_cache(names["adapter"], Fn_compute_blocks=FN, fullgraph=True, **SETTINGS)
    outputs = [transformer(**call)[0] for call in calls]
    (stats,) = cachedit_fx.summary(transformer, logging=False)
    assert stats.decisions == DECISIONS
    # The gain is a float64 from NumPy in the original and a float32 with the functor.
    torch.testing.assert_close(outputs[0::2], uncached[0::2], rtol=0, atol=1e-6)
    assert not torch.equal(outputs[1], uncached[1])
    cachedit_fx.disable_cache(names["adapter"])
    assert transformer.__dict__ == before
    assert torch.equal(transformer(**calls[0])[0], uncached[0])
