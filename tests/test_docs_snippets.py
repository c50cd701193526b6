"""The code on docs/index.md, docs/faq.md and docs/from-cache-dit.md runs as it is printed, on a tiny transformer."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import cachedit_fx
from cachedit_fx.config.cache_config import FIELD_NAMES
from tests import tiny

DOCS = Path(__file__).parents[1] / "docs"
TIMES = [torch.full((tiny.BATCH,), time / 24) for time in range(24, 12, -1)]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes "eager" the default inner backend, which compiles fast."""
    defaults = list(cachedit_fx.CacheConfig.__init__.__defaults__)
    defaults[FIELD_NAMES.index("inner_backend")] = "eager"
    monkeypatch.setattr(cachedit_fx.CacheConfig.__init__, "__defaults__", tuple(defaults))


class Transformer(tiny.Transformer):
    """Returns the tensor itself, as the models of the pages do."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, encoder_hidden_states, timestep)[0]


class Scheduler:
    def step(self, noise: Tensor, _time: Tensor, latents: Tensor) -> Tensor:
        return latents - noise / 100


class Pipe:
    """A pipeline whose prompt is a string."""

    def __init__(self, num_blocks: int) -> None:
        self.transformer = tiny.frozen(Transformer(num_blocks))
        self.components = {"transformer": self.transformer}

    def __call__(self, _prompt: str) -> Any:
        latents, prompt = tiny.latents(), tiny.prompt()
        with torch.no_grad():
            for time in TIMES:
                noise = self.transformer(latents, timestep=time, encoder_hidden_states=prompt)
                latents = Scheduler().step(noise, time, latents)
        return SimpleNamespace(images=[latents])


def snippets(page: str, containing: str = "") -> list[str]:
    """The Python code on a page, without its indentation in lists."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found if containing in code]


def test_the_three_ways_on_the_start_page_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pipe = Pipe(3)
    before = pipe("a cat").images[0]
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", {"Qwen/Qwen-Image": pipe}.__getitem__)
    monkeypatch.chdir(tmp_path)
    one_line, own_model, look_inside = snippets("index.md")
    names: dict[str, Any] = {}
    exec(one_line, names)
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    assert (stats.num_steps, len(stats.cached_steps) > 3) == (len(TIMES), True)
    torch.testing.assert_close(pipe("a cat").images[0], before, rtol=0, atol=0)

    transformer = tiny.frozen(Transformer(3))
    inputs = dict(transformer=transformer, latents=tiny.latents(), prompt=tiny.prompt(), t=TIMES[0], timesteps=TIMES)
    names = dict(inputs, scheduler=Scheduler())
    exec(own_model.replace('{"residual', '{"inner_backend": "eager", "residual'), names)
    (stats,) = cachedit_fx.summary(transformer, logging=False)
    assert stats.num_steps == len(TIMES) and stats.cached_steps

    with torch.no_grad():
        exec(look_inside, names | dict(inputs, transformer=tiny.frozen(Transformer(3))))
    assert names["cachedit_fx"] is cachedit_fx and (tmp_path / "explanation.html").exists()


def test_the_snippets_of_the_faq_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    shadow, few_steps = snippets("faq.md")
    pipe = Pipe(3)
    names = dict(pipe=pipe, prompt="a cat", cachedit_fx=cachedit_fx)
    exec(shadow, names)
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    assert stats.errors and (tmp_path / "run.html").exists()

    exec(few_steps, names)
    pipe("a cat")
    (stats,) = cachedit_fx.summary(pipe, logging=False)
    assert stats.cached_steps[0] == 2 and "warmup" in stats.decisions[:2]


def test_code_for_cache_dit_runs_with_another_import():
    (code,) = snippets("from-cache-dit.md", "import cachedit_fx as cache_dit")
    pipe = Pipe(10)
    names: dict[str, Any] = dict(pipe=pipe, prompt="a cat")
    exec(code, names)
    (stats,) = names["stats"]
    assert stats.num_steps == len(TIMES) and stats.cached_steps
    assert not cachedit_fx.is_cached(pipe.transformer)
