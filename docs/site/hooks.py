"""Hooks of mkdocs: links that leave docs/, links that are named by a file, and the changelog.

A page in docs/ may link to any file of the repository, as a code host shows it. On the site, such a link leads to the
repository if `project_urls` in setup.py has a "Source", and is plain text otherwise. A link to a file that does not
exist is an error. `[tuning.md](tuning.md)`, which is how the pages name each other, has the title of the page.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CHANGELOG = ROOT / "CHANGELOG.md"
SOURCE = re.compile(r'"Source": "([^"]+)"')
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)

FIRST = ("troubleshooting.md", "faq.md")  # What the search ranks higher: who searches has a question.

log = logging.getLogger("mkdocs.hooks")


def repository() -> str | None:
    """The address of the repository, or None if setup.py has none."""
    found = SOURCE.search((ROOT / "setup.py").read_text(encoding="utf-8"))
    return found[1].rstrip("/") if found else None


def titles(nav: Any) -> Iterator[tuple[str, str]]:
    """The file and the title of every page in the navigation."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield target, title
            else:
                yield from titles(target)


def with_site_links(markdown: str, page: Path, names: dict[str, str], address: str | None) -> str:
    """The text of a page with the links of the site.

    Args:
        markdown: The text.
        page: The file that it is from; its links are relative to the folder of this file.
        names: The title of each page in docs/.
        address: The address of the repository, if it has one.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        file = (page.parent / target).resolve()
        if not file.is_relative_to(ROOT) or not file.exists():
            log.warning("%s links to '%s', but the repository has no such file.", page.relative_to(ROOT), target)
            return text
        if file == CHANGELOG:
            return f"[{text}](changelog.md{anchor})"
        if file.is_relative_to(DOCS):
            path = file.relative_to(DOCS).as_posix()
            title = names.get(path, text) if text.removeprefix("docs/") == path else text
            return f"[{title}]({path}{anchor})"
        path = file.relative_to(ROOT).as_posix()
        return f"[{text}]({address}/blob/main/{path}{anchor})" if address else text

    blocks = CODE.findall(markdown)
    without = CODE.sub("\0", markdown)  # Code is left as it is.
    return re.sub("\0", lambda _: blocks.pop(0), LINK.sub(replaced, without))


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces links, and shows the changelog on its page."""
    names = dict(titles(config["nav"]))
    if page.file.src_uri in FIRST:
        page.meta["search"] = {"boost": 4}
    if page.file.src_uri == "changelog.md" and CHANGELOG.exists():
        return with_site_links(CHANGELOG.read_text(encoding="utf-8"), CHANGELOG, names, repository())
    return with_site_links(markdown, DOCS / page.file.src_uri, names, repository())
