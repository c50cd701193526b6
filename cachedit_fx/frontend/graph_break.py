"""Where and why Dynamo ends a graph before the model does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import fx

from cachedit_fx.patterns.nodes import SourceLine


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """A graph break.

    Attributes:
        reason: Dynamo's reason.
        path: The file of the user's code; empty if it is not known.
        number: The number of the line.
        line: The text of this line.
    """

    reason: str
    path: str
    number: int
    line: str

    @property
    def where(self) -> str:
        """`/folder/model.py:12`; empty if it is not known."""
        return f"{self.path}:{self.number}" if self.path else ""

    def __str__(self) -> str:
        place = f"{Path(self.path).name}:{self.number}, " if self.path else ""
        return f'{place}"{shorten(self.reason.splitlines()[0], 120)}"'


def break_after(gm: fx.GraphModule) -> GraphBreak | None:
    """Why Dynamo ended a graph that it captured; None if it is the end of a function."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = str(reason.reason).strip() or "graph break"
    if not reason.user_stack:
        return GraphBreak(text, "", 0, "")
    frame = reason.user_stack[-1]
    return GraphBreak(text, frame.filename, frame.lineno or 0, SourceLine(frame.filename, frame.lineno or 0).text)
