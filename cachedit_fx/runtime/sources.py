"""How Dynamo calls a graph, so that a call can be made without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sources:
    """How Dynamo calls a graph.

    Attributes:
        expressions: For every placeholder the one, over a frame's locals `L` and globals `G`, that it is found by.
        reason: Why Dynamo has to make every call of the graph; empty if it does nothing but run it on these.
        error: What went wrong where this version of torch could not be asked.
    """

    expressions: tuple[str, ...] = ()
    reason: str = ""
    error: str = ""
