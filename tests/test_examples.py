"""The examples run and print what they should, and the statements of docs/patterns.md are true."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx import BlockTemplate
from cachedit_fx.patterns import BUILT_IN, Cause, templates
from cachedit_fx.patterns.cures import CURES
from tests.synthetic import WIDTH, TextTransformer, make_inputs, plan

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def no_registered_patterns():
    yield
    for template in templates():
        if template.number is None:
            cachedit_fx.patterns.unregister_pattern(template.name)


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its two header lines."""
    section = re.split(rf"^## {re.escape(heading)}\n", PAGE, flags=re.MULTILINE)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def rounded(text: str) -> str:
    """The text without numbers that depend on the machine and without the backend that only tests use."""
    text = re.sub(r"\d+\.\d+", "#", text.replace("inner_backend='eager', ", ""))
    return "\n".join(re.sub(r" +", " ", line).rstrip() for line in text.strip().splitlines())


@pytest.mark.slow
def test_the_example_of_a_template_explains_checks_and_reuses():
    run = subprocess.run(
        [sys.executable, "examples/custom_pattern.py"], cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    why, check, used = re.split(r"^[123]\. .*\n", run.stdout, flags=re.MULTILINE)[1:]
    assert "layers: 6 blocks, no template fits" in why and why.rstrip().endswith("<its name in the code>})")
    assert "5 of 6 blocks fit: stream-name" in why
    assert "template 'two-scale' is correct: 6 blocks, of which a reused step skips layers[1:6]" in check
    reused, *_, steps, region, _session = (
        cell.strip() for cell in used.strip().splitlines()[-1].strip("| ").split("|")
    )
    assert 1 <= int(reused) < 12 and (steps, region) == ("12", "layers[1:6]")
    for shown in (why, check, used):  # The page shows the same output.
        assert rounded(shown) in rounded(PAGE)


def test_the_page_runs_from_top_to_bottom_and_prints_what_it_shows(capsys, caplog):
    names: dict[str, object] = {}
    printed = ""
    for language, text in BLOCK.findall(PAGE):
        if language == "python":
            assert not printed, f"what this prints is not shown: {printed}"
            text = text.replace("options = dict(", 'options = dict(inner_backend="eager", ')
            text = text.replace("enable_cache(adapter", 'enable_cache(adapter, inner_backend="eager"')
            caplog.clear()
            exec(compile(text, "docs/patterns.md", "exec"), names)
            printed = capsys.readouterr().out or "\n".join(record.getMessage() for record in caplog.records)
        else:
            shown = rounded(text)
            assert rounded(printed)[: len(shown)] == shown
            assert "explain" in shown.splitlines()[0] or rounded(printed) == shown  # Only that output is shortened.
            printed = ""


def test_every_cause_is_in_the_table_with_its_cure():
    listed = {cause.strip("`"): (meaning, cure) for cause, meaning, cure in rows("Causes")}
    assert list(listed) == [cause.value for cause in Cause]
    for cause in Cause:
        meaning, cure = listed[cause.value]
        assert cure == CURES[cause].replace(" (docs/patterns.md)", "")
        assert meaning.endswith(".")


def test_every_field_of_a_template_is_described():
    fields = [field.name for field in dataclasses.fields(BlockTemplate)]
    assert [row[0].strip("`") for row in rows("The template")] == fields


@pytest.mark.parametrize("row", rows("The six built-in patterns"), ids=lambda row: row[1])
def test_the_smallest_block_of_a_pattern_fits_it(row, tmp_path):
    number, name, takes, returns, code = row
    template = BUILT_IN[int(number)]
    assert (template.name, ", ".join(template.takes), ", ".join(template.returns)) == (name, takes, returns)
    with torch.no_grad():
        found = plan(smallest(template, code, tmp_path / "block.py").eval(), make_inputs(TextTransformer()))
    assert found.chain[0].label == str(template)


def smallest(template: BlockTemplate, code: str, path: Path) -> nn.Module:
    """A model of four blocks with this body; `inspect` can read its source."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def f(self, tokens: Tensor) -> Tensor:
            return self.linear(tokens).mean(dim=1, keepdim=True)

    body = "".join(f"    {statement.strip()}\n" for statement in code.strip("`").split(";"))
    source = f"def forward(self, {', '.join(template.takes)}):\n    f = self.f\n{body}"
    names: dict[str, object] = {}
    path.write_text(source, encoding="utf-8")  # The order of the returned values is read from the source.
    exec(compile(source, path, "exec"), names)
    Block.forward = names["forward"]

    class Model(TextTransformer):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
            temb = self.embed_time(timestep)
            scope = {"hidden_states": self.x_embedder(hidden_states) + temb[:, None]}
            scope["encoder_hidden_states"] = self.context_embedder(encoder_hidden_states)
            for block in self.blocks:
                made = block(*(scope[role] for role in template.takes))
                scope |= dict(zip(template.returns, made if isinstance(made, tuple) else (made,), strict=True))
            return self.unembed(scope["hidden_states"] + scope["encoder_hidden_states"].mean(1, keepdim=True), temb)

    return Model(Block)
