"""A headless Chromium that opens the pages, and checks that every page must pass in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A running Chromium. If it is not installed, the tests are skipped, except on CI, where they fail."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = "no chromium: `make browser` installs Debian's"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*FLAGS])
        yield chromium
        chromium.close()


@dataclass
class Viewed:
    """A page that is open.

    Attributes:
        page: Playwright's.
        complaints: Messages on the console and errors of scripts.
        requests: Addresses that it requested, other than its own.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """By how many pixels the body is wider than the window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found

    def background(self) -> int:
        """The brightness of the page: the sum of red, green and blue."""
        colour = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))


@contextlib.contextmanager
def viewed(chromium: Any, path: Path, *, width: int = 1200, dark: bool = False) -> Iterator[Viewed]:
    """Opens a file. Asserts at the end that there were no complaints and no requests."""
    scheme = "dark" if dark else "light"
    page = chromium.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
    found = Viewed(page)
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.set_default_timeout(5000)
    page.goto(path.as_uri())
    yield found
    page.close()
    assert found.complaints == []
    assert [url for url in found.requests if url != path.as_uri() and not url.startswith("data:")] == []
