"""The entries of docs/troubleshooting.md: the messages that it quotes, with `…` for what differs."""

from __future__ import annotations

import functools
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"


@functools.cache
def entries() -> dict[str, re.Pattern[str]]:
    """The quoted messages, in quotations and in the first cells of tables, and what each of them matches."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(("> `", "| `"))]
    quoted = [re.match(r"[>|] (`+)(.+?)\1(?=\s|$)", line)[2] for line in lines]
    return {
        text: re.compile(".*?".join(re.escape(part) for part in re.split(r" ?… ?", text)), re.DOTALL) for text in quoted
    }


def entries_for(message: str) -> list[str]:
    """The entries that a message belongs to, whatever the line breaks and the spaces in it."""
    flat = re.sub(r"\s+", " ", message)
    return [text for text, pattern in entries().items() if text.startswith("cachedit_fx:") and pattern.search(flat)]
