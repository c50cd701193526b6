"""The record of why a template or a rewrite does not fit, and the record of a template that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.cures import CURES
from cachedit_fx.patterns.nodes import SourceLine
from cachedit_fx.patterns.template import BlockTemplate


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a template does not fit a block list, or why a graph cannot be cached.

    Attributes:
        template: The template that does not fit; None if the graph cannot be cached with any template.
        expected, found: What was expected and what was found: a noun phrase or a clause, without a period.
        node: Name of the graph node that shows the mismatch.
        where: The line of the user's code that created this node.
        stream: Role of the stream that is concerned.
        lost_at: Index of the boundary at which a stream is missing (boundary i lies before block i).
        progress: Number of blocks that fit before the first one that does not. It ranks the mismatches of a list.
        total: Number of blocks of the list.
        path: Path of the list; empty if no particular list is concerned.
    """

    template: BlockTemplate | None
    cause: Cause
    expected: str
    found: str
    node: str | None = None
    where: SourceLine | None = None
    stream: str | None = None
    lost_at: int | None = None
    progress: int = 0
    total: int = 0
    path: str = ""

    @property
    def cure(self) -> str:
        """What a user can do about it."""
        return CURES[self.cause]

    @property
    def reason(self) -> str:
        """The mismatch on one line, without its template and place."""
        return f"{self.cause.value}: expected: {self.expected}; found: {self.found}"

    @property
    def place(self) -> str:
        """The node and the line of the user's code, for messages; empty if neither is known."""
        return " in ".join(filter(None, (f"`{self.node}`" if self.node else "", str(self.where or ""))))

    @property
    def lines(self) -> list[str]:
        """What was expected, what was found, where, and the line of code: one indented line each, for messages."""
        line = self.where.text if self.where is not None else ""
        return list(labelled_lines({"expected": self.expected, "found": self.found, "at": self.place, "line": line}))

    def __str__(self) -> str:
        template = f"{self.template}: " if self.template else ""
        return f"{template}{self.reason}{f'; at: {self.place}' if self.place else ''}"


def labelled_lines(texts: dict[str, str]) -> Iterator[str]:
    """`  expected: 2 streams`: one line for each text that is not empty, aligned."""
    return (f"  {label + ':':<10}{text}" for label, text in texts.items() if text)


class MismatchError(Exception):
    """Raised by an analysis that cannot continue. The top of the planning catches it; it never reaches users.

    Attributes:
        mismatches: Why the graph cannot be cached, the nearest mismatch first. At least one.
    """

    def __init__(self, *mismatches: Mismatch) -> None:
        super().__init__(*mismatches)
        self.mismatches = mismatches

    def __str__(self) -> str:
        return "\n".join(map(str, self.mismatches))


@dataclass(frozen=True, slots=True)
class Match:
    """A block list that fits a template.

    Attributes:
        label: The template as messages show it, for example "pattern 1 (dual-stream, encoder first)". It leaves the
            number open ("pattern 0 or 1") if the return statement of the block could not be read.
        mismatches: Why the templates that were tried before this one do not fit.
    """

    template: BlockTemplate
    blocks: BlockList
    label: str
    mismatches: tuple[Mismatch, ...] = ()

    @property
    def passed_over(self) -> dict[BlockTemplate, Mismatch]:
        """Why templates that a user registered, and that were tried before this one, do not fit."""
        return {m.template: m for m in self.mismatches if m.template is not None and m.template.number is None}
