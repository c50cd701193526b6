"""A miss is a value: why a template did not fit, where, and how far it got."""

from __future__ import annotations

from dataclasses import dataclass

from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.cures import CURES
from cachedit_fx.patterns.template import BlockTemplate


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A template that did not fit (or, without one, a graph that cannot be cached at all). Falsy.

    Attributes:
        detail: One sentence: what was expected, what was found.
        node: Name of the graph node where it was seen.
        where: `file.py:line` of the user's code behind the node.
        progress: Blocks that did fit before the first that did not; ranks the nearest miss.
        total: Blocks there were.
    """

    template: BlockTemplate | None
    cause: Cause
    detail: str
    node: str | None = None
    where: str = ""
    progress: int = 0
    total: int = 0

    def __bool__(self) -> bool:
        return False

    @property
    def expected(self) -> str:
        """What was expected, in words; empty where the detail says but what was found."""
        before, comma, _ = self.detail.partition(", found ")
        return before.removeprefix("expected ") if comma else ""

    @property
    def found(self) -> str:
        """What was found, in words."""
        return self.detail.partition(", found ")[2] or self.detail

    @property
    def lines(self) -> list[str]:
        """What was expected, found, and where: a line each, indented, for messages."""
        place = " in ".join(filter(None, (f"`{self.node}`" if self.node else "", self.where)))
        shown = {"expected": self.expected, "found": self.found, "at": place}
        return [f"  {name + ':':<10}{text}" for name, text in shown.items() if text]

    @property
    def cure(self) -> str:
        """What a user can do about it."""
        return CURES[self.cause]

    def __str__(self) -> str:
        head = f"{self.template}: " if self.template else ""
        at = f", at `{self.node}`" if self.node else ""
        return f"{head}{self.cause.value}: {self.detail}{at}{f' ({self.where})' if self.where else ''}"


@dataclass(frozen=True, slots=True)
class Match:
    """A block list that fits a template.

    Attributes:
        label: What users see: "pattern 1 (dual-stream, encoder first)"; "0 or 1" where the order of the block's
            return statement could not be read.
    """

    template: BlockTemplate
    blocks: BlockList
    label: str
