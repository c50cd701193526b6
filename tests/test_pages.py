"""The pages in a browser: their controls work at every width, and no text becomes markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import CacheConfig
from cachedit_fx.inspect import Explanation
from cachedit_fx.inspect.explanation.dynamo_recorder import RecordedGraph
from cachedit_fx.inspect.pages.layout import spans_of
from cachedit_fx.inspect.reports import RunReport
from cachedit_fx.runtime.stats import CacheStats, StepError, Summary
from tests import hybrid
from tests.models import FAMILIES, denoise
from tests.pages import browser, viewed
from tests.tiny import frozen
from tests.zoo import VARIANTS

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&lt;\"'"
CONFIG = CacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1)


def explained(name: str) -> Explanation:
    """The explanation of a model with few channels."""
    with torch.no_grad():
        if name == "loses-text":
            return cachedit_fx.explain(hybrid.build(hybrid.LosesText), **hybrid.calls()[0])
        if name in FAMILIES:
            family = FAMILIES[name]
            call = dict(hidden_states=family.latents(1), timestep=torch.ones(2), **family.prompt(1).cond)
            return cachedit_fx.explain(family.build(), **call, cache_config=CONFIG)
        variant = VARIANTS[name]
        return cachedit_fx.explain(variant.build(), **variant.inputs(), cache_config=CONFIG)


def ran(name: str, *, shadow: bool) -> RunReport:
    """The report of a generation of a model family, with guidance if the family has it."""
    family = FAMILIES[name]
    config = CacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=3,
        residual_diff_threshold=family.threshold,
        inner_backend="eager",
        shadow=shadow,
    )
    model = family.build()
    compiled: Any = torch.compile(model, backend=cachedit_fx.Backend(config))
    with torch.no_grad():
        denoise(lambda _, **call: compiled(**call)[0], family, family.prompt(1), family.latents(1), 10)
    return cachedit_fx.report(model)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    explanation = explained("flux")
    return explanation, explanation.to_html(tmp_path_factory.mktemp("flux") / "flux.html")


@pytest.fixture(scope="module")
def shadowed() -> RunReport:
    return ran("flux", shadow=True)


@pytest.fixture(scope="module")
def chromium(flux: object) -> Iterator[Any]:
    with browser() as found:
        yield found


def test_a_click_opens_a_blocks_code_and_escape_closes_it(chromium: Any, flux: tuple[Explanation, Path]) -> None:
    explanation, path = flux
    block = explanation.graphs[0].blocks[2]
    with viewed(chromium, path) as found:
        panel = found.page.locator("#panel")
        assert not panel.is_visible()
        found.page.locator(".opens").nth(2).click()
        assert panel.is_visible()
        assert found.page.locator("#panel-title").inner_text() == f"Block 2: {block.path}"
        assert found.page.locator("#panel-code").text_content().rstrip("\n") == block.code
        assert block.cls in found.page.locator("#panel-facts").inner_text()
        found.page.keyboard.press("Escape")
        assert not panel.is_visible()
        assert found.page.evaluate("document.activeElement.dataset.block") == "g0-2"


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_key_opens_a_blocks_code(chromium: Any, flux: tuple[Explanation, Path], key: str) -> None:
    with viewed(chromium, flux[1]) as found:
        for _ in range(40):  # The block must be reachable with the Tab key alone.
            found.page.keyboard.press("Tab")
            if found.page.evaluate("document.activeElement.matches('.opens')"):
                break
        found.page.keyboard.press("ArrowRight")
        found.page.keyboard.press(key)
        assert found.page.locator("#panel-title").inner_text().startswith("Block 1: ")
        found.page.get_by_role("button", name="Next block").click()
        assert found.page.locator("#panel-title").inner_text().startswith("Block 2: ")
        found.page.get_by_role("button", name="Close (Escape)").click()
        assert not found.page.locator("#panel").is_visible()


def test_before_and_after_are_side_by_side_and_open_together(chromium: Any, flux: tuple[Explanation, Path]) -> None:
    explanation, path = flux
    with viewed(chromium, path) as found:
        row = found.page.locator(".row", has=found.page.locator("details.block-code")).first
        left, right = row.locator("details").nth(0), row.locator("details").nth(1)
        left.locator("summary").click()
        right.locator("pre").wait_for()
        code = explanation.graphs[0].blocks[0].code
        assert left.locator("pre").text_content().rstrip("\n") == code
        assert right.locator("pre").text_content().rstrip("\n") == code
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        assert found.page.locator(".row.added", has_text="if decide:").count() == 1
        body = found.page.locator(".row.added .depth-1", has_text="residual = ").first
        assert body.inner_text().startswith("residual = torch.sub(")


class Plain(nn.Module):
    """Twenty blocks, of which the last ones are wider."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8] * 14 + [16] * 6
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, w), nn.GELU(), nn.Linear(w, 8)) for w in widths)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = hidden_states + timestep
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    call = dict(hidden_states=torch.randn(2, 6, 8), timestep=torch.tensor(1.0))
    with torch.no_grad():
        explanation = cachedit_fx.explain(frozen(Plain()), cache_config=CONFIG, **call)
    return explanation, explanation.to_html(tmp_path_factory.mktemp("deep") / "deep.html")


def test_equal_blocks_are_one_stack_that_shows_its_blocks(chromium: Any, deep: tuple[Explanation, Path]) -> None:
    explanation, path = deep
    assert spans_of(explanation.graphs[0]) == [(0, 1), (1, 14), (14, 19), (19, 20)]
    with viewed(chromium, path) as found:
        stacks, lane = found.page.locator(".stack"), found.page.locator(".lane")
        assert found.page.locator(".stack .times").all_text_contents() == ["× 13", "× 5"]
        assert lane.evaluate("box => box.scrollWidth <= box.clientWidth")  # The reuse branch is in view.
        assert found.page.locator(".opens").count() == 20
        block = found.page.locator('.opens[data-block="g0-7"]')
        assert not block.is_visible()
        stacks.first.click()
        block.click()
        assert found.page.locator("#panel-title").inner_text() == "Block 7: blocks.7"
        found.page.keyboard.press("Escape")
        for _ in range(7):  # The arrow keys move into the next stack, and show it.
            found.page.keyboard.press("ArrowRight")
        assert found.page.evaluate("document.activeElement.dataset.block") == "g0-14"
        assert stacks.nth(1).get_attribute("aria-expanded") == "true"
        stacks.first.press("Enter")
        assert not block.is_visible()


# The size of every text on the screen: that of its font, times the scale of the drawing that it is in.
SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll("body *")]
    .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
        && one.getBoundingClientRect().width > 0 && !one.matches("title, script, style"))
    .map((one) => parseFloat(getComputedStyle(one).fontSize) * (one.getScreenCTM ? one.getScreenCTM().a : 1)))"""
CUT = """() => [...document.querySelectorAll(".scroll")]
    .filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.innerText.slice(0, 60))"""


@pytest.mark.parametrize("width", [1280, 420])
def test_no_text_is_small_and_no_column_is_cut(
    chromium: Any, flux: tuple[Explanation, Path], shadowed: RunReport, tmp_path: Path, width: int
) -> None:
    for path in (flux[1], shadowed.to_html(tmp_path / "run.html")):
        with viewed(chromium, path, width=width) as found:
            assert found.page.evaluate(SMALLEST_TEXT) >= 11.99
            assert found.page.evaluate(CUT) == []
            assert found.overflow() <= 0


def test_a_drawing_that_is_wider_than_the_screen_shows_that_it_goes_on(
    chromium: Any, flux: tuple[Explanation, Path]
) -> None:
    with viewed(chromium, flux[1], width=420) as found:
        more, lane = found.page.locator(".lane-box > .more"), found.page.locator(".lane")
        assert more.is_visible() and found.page.locator(".reuse-line").is_visible()
        lane.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        more.wait_for(state="hidden")
    with viewed(chromium, flux[1]) as found:
        assert not found.page.locator(".lane-box > .more").is_visible()
        assert not found.page.locator(".reuse-line").is_visible()


def test_dark_and_light_follow_the_system_and_the_button(chromium: Any, flux: tuple[Explanation, Path]) -> None:
    with viewed(chromium, flux[1]) as found:
        assert found.background() > 600
        found.page.locator("#theme").click(click_count=2)
        assert found.background() < 200
    with viewed(chromium, flux[1], dark=True) as found:
        assert found.background() < 200
        found.page.locator("#theme").click()
        assert found.background() > 600


@pytest.mark.parametrize("name", ["wan", "HunyuanDiT", "loses-text"])
def test_every_model_has_a_page_that_fits_a_phone(chromium: Any, tmp_path: Path, name: str) -> None:
    explanation = explained(name)
    path = explanation.to_html(tmp_path / "page.html")
    with viewed(chromium, path, width=390) as found:
        assert found.overflow() <= 0
        assert found.page.locator(".opens").count() == len(explanation.graphs[0].blocks)
        verdict = found.page.locator(".verdict").inner_text()
        assert ("Not cached" in verdict) is (name == "loses-text")
        assert found.page.locator(".skip").count() == (3 if name == "HunyuanDiT" else 0)
        assert found.page.locator(".break-line").count() == (name == "loses-text")
        if name == "loses-text":
            card = found.page.locator(".card.miss").first.inner_text()
            nearest = explanation.graphs[0].verdicts[0]
            assert all(words in card for words in (nearest.expected, nearest.found, nearest.line, nearest.cure))
        found.page.locator(".opens").first.click()
        assert found.page.locator("#panel-code").is_visible()
        assert found.overflow() <= 0


@pytest.mark.parametrize(("name", "shadow"), [("wan", False), ("flux", True)])
def test_a_run_has_a_page_that_fits_a_phone(
    chromium: Any, shadowed: RunReport, tmp_path: Path, name: str, shadow: bool
) -> None:
    report = shadowed if shadow else ran(name, shadow=shadow)
    assert len(report.stats) == (2 if name == "wan" else 1)
    with viewed(chromium, report.to_html(tmp_path / "page.html"), width=390) as found:
        assert found.overflow() <= 0
        assert found.page.locator("details.graph").count() == len(report.stats)
        assert found.page.locator("figure").count() == (4 if shadow else 2) * len(report.stats)
        assert found.page.locator("text=Choosing a threshold").count() == shadow
        reused = sum(len(entry.cached_steps) for entry in report.stats)
        assert found.page.locator(".badge.reused").count() == reused > 0


def hostile(explanation: Explanation) -> Explanation:
    """The same explanation, with hostile text in every place that a model controls."""
    report = explanation.graphs[0]
    block = dataclasses.replace(
        report.blocks[1], path=HOSTILE, cls=HOSTILE, code=f"{HOSTILE} = {HOSTILE}", where=HOSTILE, makes=(HOSTILE,)
    )
    words = dict(dataclasses.asdict(explained("loses-text").graphs[0].verdicts[0]), found=HOSTILE, line=HOSTILE)
    verdict = type(explained("loses-text").graphs[0].verdicts[0])(**words)
    lists = (dataclasses.replace(report.lists[0], path=HOSTILE), *report.lists[1:])
    blocks = (report.blocks[0], block, *report.blocks[2:])
    report = dataclasses.replace(report, cls=HOSTILE, blocks=blocks, lists=lists, verdicts=(verdict,), timestep=HOSTILE)
    modules = [dataclasses.replace(explanation.modules[0], cls=HOSTILE, why=HOSTILE, config={"mode": HOSTILE})]
    return Explanation(HOSTILE, modules, [RecordedGraph(report, explanation.graph_modules[0])], [HOSTILE])


def test_text_never_becomes_markup(chromium: Any, flux: tuple[Explanation, Path], tmp_path: Path) -> None:
    explanation = hostile(flux[0])
    entry = CacheStats(HOSTILE, HOSTILE, 2, [1], {1: 0.01}, ["warmup", HOSTILE], module=HOSTILE, began=HOSTILE)
    entry = dataclasses.replace(entry, errors={1: StepError(True, {HOSTILE: 0.1}, 0.2)}, thresholds={1: 0.1})
    run = RunReport(HOSTILE, Summary([entry], title=HOSTILE))
    pages = {
        "explanation": explanation.to_html(tmp_path / "explanation.html"),
        "run": run.to_html(tmp_path / "run.html"),
    }
    for name, fragment in {"notebook": explanation._repr_html_(), "table": run._repr_html_()}.items():
        pages[name] = tmp_path / f"{name}.html"
        pages[name].write_text(f"<!doctype html><meta charset=utf-8>{fragment}", encoding="utf-8")
    for name, path in pages.items():
        with viewed(chromium, path) as found:
            assert HOSTILE in found.page.locator("body").inner_text(), name
            if name == "explanation":
                found.page.locator(".opens").nth(1).click()
                assert HOSTILE in found.page.locator("#panel-code").text_content()
            assert found.page.evaluate("window.hacked") is None, name
            assert found.page.locator("img").count() == 0, name
