"""The result of `explain`: `Explanation`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.aten import aten_view
from cachedit_fx.inspect.explanation.data import Captured
from cachedit_fx.inspect.explanation.diff import unified_diff
from cachedit_fx.inspect.explanation.dynamo_recorder import RecordedGraph
from cachedit_fx.inspect.explanation.explanation_data import Explained
from cachedit_fx.inspect.explanation.text import page

GRAPHS = ("before", "after", "head", "compute", "reuse", "tail")


class Explanation(Explained):
    """What the compiler does with a model. Its `str` is a page of text. See `Explained` for the attributes."""

    def __init__(
        self, title: str, modules: Sequence[Captured], recorded: Sequence[RecordedGraph], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(title, modules, [one.report for one in recorded], [one.graphs for one in recorded], notes)

    def graph(self, which: str, index: int | None = None, *, region: int = 0, aten: bool = False) -> fx.GraphModule:
        """Returns a copy of one of the graphs, which can be printed (`print_readable()`, `code`).

        The copy shares the weights of the model.

        Args:
            which: "before" (the captured graph), "after" (the cached graph), or a part of the latter: "head",
                "compute", "reuse", "tail".
            index: The index in `graphs`; by default the largest cached graph, or else the largest graph.
            region: The number of the region, for "compute" and "reuse".
            aten: Whether to return aten operations (by functorch), at the shapes of the explained call.

        Raises:
            ConfigError: There is no such graph.
        """
        held = self.graph_modules[self.index(index)]
        name = f"{which}_{region}" if which in ("compute", "reuse") else which
        if name not in held:
            allowed = ", ".join(repr(graph_name.removesuffix("_0")) for graph_name in held)
            raise ConfigError(f"cachedit_fx: which must be one of {allowed} for this graph, got {which!r}")
        return aten_view(held[name]) if aten else held[name]

    def diff(self, index: int | None = None, *, expand: Sequence[str] | bool = ()) -> str:
        """Returns a unified diff of the graph before and after the rewrite, with one line per block.

        Args:
            index: As for `graph`.
            expand: The paths of the blocks whose nodes are shown; True for all blocks.

        Raises:
            ConfigError: `expand` names a block that the graph does not have.
        """
        i = self.index(index)
        return unified_diff(self.graphs[i], self.graph_modules[i], expand)

    def to_dict(self) -> dict[str, Any]:
        """Returns all data, except the graphs themselves, in a form that JSON can store."""
        return {
            "title": self.title,
            "is_cached": self.is_cached,
            "modules": [dataclasses.asdict(captured) for captured in self.modules],
            "notes": list(self.notes),
            "graphs": [dataclasses.asdict(report) for report in self.graphs],
        }

    def to_html(self, path: str | Path) -> Path:
        """Writes the explanation as one HTML file that loads nothing from the network, and returns its path.

        Raises:
            ConfigError: jinja2 is not installed.
        """
        from cachedit_fx.inspect.pages import explanation_page

        target = Path(path)
        target.write_text(explanation_page(self), encoding="utf-8")
        return target

    def plot(self, path: str | Path | None = None, *, index: int | None = None) -> Any:
        """Returns the chain as a matplotlib figure, and writes it to `path` (png, svg or pdf) if a path is given.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from cachedit_fx.inspect.pages import plot_chain

        return plot_chain(self.graphs[self.index(index)], path)

    def _repr_html_(self) -> str:
        from cachedit_fx.inspect.pages import explanation_fragment

        return explanation_fragment(self)

    def __str__(self) -> str:
        return page(self)

    __repr__ = __str__
