"""Checks that the pages of the built site load nothing from the network, and that the files that they load exist.

    python docs/site/check_site.py site

`mkdocs build --strict` checks the links in the text. Exits with 1 and one line per problem.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
IN_CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


class Loaded(HTMLParser):
    """Collects what a page loads when it is opened, and the text of its styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and LOADED_LINKS & set(given.get("rel", "").split()):
            self.found.append(given.get("href", ""))
        elif tag in LOADS and given.get(LOADS[tag]):
            self.found.append(given[LOADS[tag]])
        self.found += IN_CSS.findall(given.get("style", ""))


def problems(site: Path) -> Iterator[str]:
    """One line for each thing that a page or a style sheet would load from the network, or that is missing."""
    for page in sorted(site.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        loaded = Loaded()
        loaded.feed(text)
        loaded.found += IN_CSS.findall("".join(re.findall(r"<style.*?</style>", text, re.DOTALL)))
        for target in dict.fromkeys(loaded.found):
            if re.match(r"(https?:)?//", target):
                yield f"{page.relative_to(site)}: loads {target}"
            elif not target.startswith(("data:", "/")) and not (page.parent / target.partition("?")[0]).exists():
                yield f"{page.relative_to(site)}: {target} is missing"
    for sheet in sorted(site.rglob("*.css")):
        for target in IN_CSS.findall(sheet.read_text(encoding="utf-8")):
            yield f"{sheet.relative_to(site)}: loads {target}"


def main(arguments: list[str]) -> int:
    """Checks the site in the given folder. Returns the exit status."""
    if len(arguments) != 1 or not Path(arguments[0], "index.html").is_file():
        print(f"usage: check_site.py FOLDER (a built site), got {arguments}", file=sys.stderr)
        return 2
    found = list(problems(Path(arguments[0])))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
