"""What `explain`, the log and the page say about a mismatch: its place, templates that do not fit, graph breaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import BlockTemplate, CacheConfig
from cachedit_fx.inspect import Explanation
from cachedit_fx.inspect.pages.chain import chain_svg
from cachedit_fx.patterns import unregister_pattern
from cachedit_fx.patterns.returns import return_keys
from tests import hybrid, synthetic, tiny

CONFIG = CacheConfig(Fn_compute_blocks=1, inner_backend="eager")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def drops() -> Explanation:
    """The explanation of a model that drops tokens between block 1 and block 2."""
    model = synthetic.DropsTokens().eval()
    with torch.no_grad():
        return cachedit_fx.explain(model, cache_config=CONFIG, **synthetic.make_inputs(model))


def test_dropped_tokens_are_blamed_on_the_line_that_drops_them(drops: Explanation) -> None:
    nearest = drops.graphs[0].verdicts[0]
    assert (nearest.place, nearest.stream) == ("between blocks.1 and blocks.2", "hidden_states")
    assert nearest.line == "hidden_states = hidden_states[:, ::2]"
    assert nearest.cure.startswith("change the model")
    text = str(drops)
    assert f"at:       between blocks.1 and blocks.2, node `{nearest.node}`" in text
    assert nearest.line in text and "block 3" not in text
    logged = f"  at:       `{nearest.node}` in {nearest.where}\n  line:     {nearest.line}\n"
    assert logged in drops.modules[0].message


def test_a_graph_that_is_not_cached_is_drawn_with_its_broken_place(drops: Explanation, tmp_path: Path) -> None:
    (graph,) = drops.graphs
    assert [block.path for block in graph.blocks] == [f"blocks.{i}" for i in range(synthetic.DEPTH)]
    assert (graph.broken_at, graph.blamed) == (2, "")
    drawing = chain_svg(graph, "g0")
    assert drawing.count("opens") == synthetic.DEPTH and drawing.count("break-line") == 1
    assert "hidden_states ends here (synthetic.py:" in drawing
    page = drops.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Not cached: the stream hidden_states ends between blocks.1 and blocks.2 (synthetic.py:" in page
    assert page.count('<div class="row broken">') == 1
    chain = [line.strip() for line in str(drops).splitlines() if "✗" in line or line.strip().startswith("blocks.")]
    assert [line.split()[0] for line in chain] == ["blocks.0", "blocks.1", "✗", "blocks.2-3"]


def test_a_registered_template_that_does_not_fit_is_mentioned_for_a_cached_graph() -> None:
    model = synthetic.TextTransformer().eval()
    cachedit_fx.register_pattern(BlockTemplate("other", ("hidden_states",), ("hidden_states", "encoder_hidden_states")))
    try:
        explanation = cachedit_fx.explain(model, cache_config=CONFIG, **synthetic.make_inputs(model))
    finally:
        unregister_pattern("other")
    (graph,) = explanation.graphs
    assert graph.is_cached and not graph.blamed
    assert "registered templates that were tried first and do not fit:\n  template 'other'" in str(explanation)
    assert [verdict.template for verdict in graph.verdicts] == ["template 'other'"]


def test_a_registered_template_is_mentioned_if_nothing_fits() -> None:
    cachedit_fx.register_pattern(BlockTemplate("far", ("hidden_states",), ("hidden_states",), block_class="Other"))
    try:
        explanation = cachedit_fx.explain(hybrid.build(hybrid.LosesText), cache_config=CONFIG, **hybrid.calls()[0])
    finally:
        unregister_pattern("far")
    assert not explanation.is_cached
    assert "template 'far', 0 of 3 blocks fit: restricted" in str(explanation)


# Dicts.


class DictBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        mean = state["txt"].mean(1, keepdim=True) + state["temb"]
        return {**state, "img": state["img"] + self.img(state["img"] + mean), "txt": state["txt"] + self.txt(mean)}


class DictModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_text = nn.Linear(4, 8), nn.Linear(3, 8)
        self.blocks = nn.ModuleList(DictBlock() for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, latents: Tensor, prompt: Tensor, timestep: Tensor) -> Tensor:
        temb = timestep[:, None, None].expand(-1, 1, 8)
        state = {"img": self.embed(latents), "txt": self.embed_text(prompt), "temb": temb}
        for block in self.blocks:
            state = block(state)
        return self.out(state["img"])


CALL = dict(latents=torch.randn(1, 6, 4), prompt=torch.randn(1, 5, 3), timestep=torch.tensor([0.5]))
ROLES, LABELS = ("hidden_states", "encoder_hidden_states"), ("img", "txt")


@pytest.mark.parametrize("img", ["img", "image"])
def test_the_keys_of_a_dict_name_the_streams(img: str, caplog: pytest.LogCaptureFixture) -> None:
    streams = {"hidden_states": img, "encoder_hidden_states": "txt"}
    cachedit_fx.register_pattern(BlockTemplate("keys", ROLES, ROLES, streams=streams, block_class="DictBlock"))
    model = tiny.frozen(DictModel())
    try:
        explanation = cachedit_fx.explain(model, cache_config=CONFIG, **CALL)
        torch.compile(model, backend=cachedit_fx.Backend(CONFIG))(**CALL)
    finally:
        unregister_pattern("keys")
    (graph,) = explanation.graphs
    assert graph.is_cached
    assert [(stream.role, stream.label) for stream in graph.lists[0].streams] == [*zip(ROLES, LABELS, strict=True)]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if img == "img":
        assert (graph.lists[0].pattern, graph.verdicts, warnings) == ("template 'keys'", (), [])
    else:
        (verdict,) = graph.verdicts
        assert (verdict.template, verdict.cause) == ("template 'keys'", "stream-name")
        assert "'image'" in verdict.expected and verdict.found == "streams with the names img, txt"
        assert "template 'keys'" in str(explanation)
        (warning,) = warnings
        assert "template 'keys' does not fit blocks (DictBlock), so pattern 0 or 1" in warning


class Keywords(DictBlock):
    def forward(self, state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return dict(a=x + 1, b=x, c=state["c"])


class Items(DictBlock):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["b"] = batch["a"] * 2
        batch["a"] = batch["a"] + 1
        return batch


class Attributes(DictBlock):
    def forward(self, batch: nn.Module) -> nn.Module:
        batch.a = batch.a * 2
        return batch


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (DictBlock, {"img": True, "txt": True}),
        (Keywords, {"a": True, "b": False}),
        (Items, {"b": True, "a": True}),
        (Attributes, {"a": True}),
        (tiny.Block, {}),
        (None, {}),
    ],
)
def test_the_keys_are_read_from_the_return_statement(cls: type | None, keys: dict[str, bool]) -> None:
    assert [*return_keys(cls).items()] == [*keys.items()]


# UNets.


class Conv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


class Levels(nn.Module):
    """A small UNet: it convolves at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Conv(4), nn.Conv2d(4, 8, 3, 2, 1), Conv(8)])
        self.up = nn.ModuleList([Conv(8), nn.ConvTranspose2d(8, 4, 2, 2), Conv(4)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for layer in (*self.down, *self.up):
            sample = layer(sample)
        return sample + timestep


class ConvolvingBlock(nn.Module):
    """A transformer block with a convolution at one resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        return hidden_states + self.linear(hidden_states)


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvolvingBlock() for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sample = sample + timestep
        for block in self.blocks:
            sample = block(sample)
        return sample


def test_a_unet_is_told_that_it_has_no_transformer_blocks() -> None:
    call = dict(sample=torch.randn(1, 4, 8, 8), timestep=torch.tensor(1.0))
    explanation = cachedit_fx.explain(tiny.frozen(Levels()), cache_config=CONFIG, **call)
    (verdict,) = explanation.graphs[0].verdicts
    assert (verdict.cause, verdict.template) == ("no-transformer", "")
    assert verdict.found.startswith("convolutions at 2 resolutions, which make up ")
    sentence = "Levels has no chain of equal transformer blocks; cachedit_fx caches diffusion transformers."
    assert sentence in explanation.modules[0].message


def test_a_transformer_may_convolve() -> None:
    call = dict(sample=torch.randn(1, 6, 8), timestep=torch.tensor(1.0))
    assert cachedit_fx.explain(tiny.frozen(Convolving()), cache_config=CONFIG, **call).is_cached


# Breaks.


class Branching(nn.Module):
    """A graph break in the loop: a branch on the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sample = sample + timestep
        if sample.sum() > 0:
            sample = sample + 1
        for block in self.blocks:
            sample = sample + block(sample)
            if sample.mean() > 0:
                sample = sample * 2
        return sample


@pytest.mark.parametrize("bare", [False, True])
def test_a_break_is_reported_with_its_line(bare: bool, caplog: pytest.LogCaptureFixture) -> None:
    call = dict(sample=torch.ones(1, 6, 8), timestep=torch.tensor(1.0))
    model = tiny.frozen(Branching())
    if bare:
        torch.compile(model, backend=cachedit_fx.Backend(CONFIG))(**call)
    else:
        explanation = cachedit_fx.explain(model, cache_config=CONFIG, **call)
        assert "\n                if sample.sum() > 0:\n" in str(explanation)
        torch._dynamo.reset()
        cachedit_fx.enable_cache(model, CONFIG)
        for _ in range(3):
            model(**call)
    messages = [record.getMessage() for record in caplog.records if record.name == "cachedit_fx.frontend.uncached"]
    assert "\n  line:     if sample.sum() > 0:\n" in messages[0]
    assert (
        "What to do: change the code at this place so that Dynamo can capture it, or write a patch functor"
        in messages[0]
    )
