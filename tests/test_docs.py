"""The documentation: links work on a code host and on the site, and the site loads nothing from the network.

`make docs` builds the site, with every warning as an error.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cachedit_fx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), ROOT / "examples" / "digits" / "README.md"]
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")

hooks = runpy.run_path(str(DOCS / "site" / "hooks.py"))
check_site = runpy.run_path(str(DOCS / "site" / "check_site.py"))


def links(file: Path) -> Iterator[tuple[Path, str]]:
    """The relative links of a file: the files that they lead to, and the anchors."""
    for target in LINK.findall(CODE.sub("code", file.read_text(encoding="utf-8"))):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield (file.parent / path).resolve() if path else file, anchor


def anchors(file: Path) -> set[str]:
    """The anchors of a file: those of its headings, as a code host makes them, and those that it sets itself."""
    text = re.sub(r"^ *```.*?^ *```$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+?)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*slugs, *re.findall(r'<a id="([\w-]+)">', text)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(file: Path):
    for target, anchor in links(file):
        assert target.exists(), target
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), (target, anchor)


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: cachedit_fx\.([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(cachedit_fx.__all__) <= {name.rpartition(".")[2] for name in listed}


def test_every_picture_is_drawn_without_other_files():
    pictures = [*DOCS.rglob("*.svg")]
    assert len(pictures) >= 4
    for picture in pictures:
        loaded = re.findall(r'(?:href|src)="(?!#)([^"]+)"|url\((?!#)', picture.read_text(encoding="utf-8"))
        assert loaded == [], picture


def on_site(markdown: str, address: str | None = None) -> str:
    return hooks["with_site_links"](markdown, DOCS / "faq.md", {"tuning.md": "Tuning"}, address)


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[tuning.md](tuning.md#calls)", "[Tuning](tuning.md#calls)"),
        ("[how to](tuning.md)", "[how to](tuning.md)"),
        ("[`tune`](tuning.md)", "[`tune`](tuning.md)"),
        ("[README](../README.md#install)", "README"),
        ("[the digits](../examples/digits/README.md)", "the digits"),
        ("```\n[a](../README.md)\n```\n[a](../README.md)", "```\n[a](../README.md)\n```\na"),
        ("![picture](assets/steps.svg) and [site](https://example.org/a.md)", None),
        ("[here](#calls)", None),
    ],
)
def test_links_on_the_site(markdown: str, expected: str | None):
    assert on_site(markdown) == (markdown if expected is None else expected)


def test_a_link_out_of_the_documentation_leads_to_the_repository_if_it_has_an_address():
    found = on_site("[README](../README.md#install)", "https://example.org/repo")
    assert found == "[README](https://example.org/repo/blob/main/README.md#install)"


def test_a_link_to_a_file_that_does_not_exist_is_a_warning(caplog):
    assert on_site("[gone](../gone.md)") == "gone"
    assert "docs/faq.md links to '../gone.md', but the repository has no such file." in caplog.text


def test_what_a_page_would_load_from_the_network_is_found(tmp_path: Path):
    (tmp_path / "own.js").write_text("", encoding="utf-8")
    (tmp_path / "style.css").write_text("@import '//fonts.example.org/a'; a { background: url(data:1) }")
    page = """<link rel="stylesheet" href="https://cdn.example.org/a.css"> <script src="own.js?1"></script>
    <script src="gone.js"></script> <a href="https://example.org"></a> <img src="https://example.org/a.png">"""
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    problems: Callable[[Path], Any] = check_site["problems"]
    assert [*problems(tmp_path)] == [
        "index.html: loads https://cdn.example.org/a.css",
        "index.html: gone.js is missing",
        "index.html: loads https://example.org/a.png",
        "style.css: loads //fonts.example.org/a",
    ]
