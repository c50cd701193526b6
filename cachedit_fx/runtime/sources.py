"""How Dynamo calls a graph: what fast dispatch needs to call it without Dynamo."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sources:
    """How Dynamo calls a graph.

    Attributes:
        expressions: For every placeholder, the expression over the locals `L` and globals `G` of a frame that finds it.
        reason: Why Dynamo has to make every call of the graph; empty if Dynamo only runs the graph on these inputs.
        error: The error that reading Dynamo's records raised with this version of torch; empty if there was none.
    """

    expressions: tuple[str, ...] = ()
    reason: str = ""
    error: str = ""
