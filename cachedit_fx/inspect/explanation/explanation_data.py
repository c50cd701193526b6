"""What was found out about a model, which every rendering of an explanation reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.data import Captured, GraphReport


class Explained:
    """The data of an `Explanation`.

    Attributes:
        title: The name of the class of the explained object.
        modules: How each transformer was captured.
        graphs: The report of each graph, in execution order. A model that is captured whole has one graph.
        graph_modules: The graphs themselves and their parts by name, for each of `graphs`.
        notes: Further remarks, one sentence each.
    """

    def __init__(
        self,
        title: str,
        modules: Sequence[Captured],
        graphs: Sequence[GraphReport],
        graph_modules: Sequence[Mapping[str, fx.GraphModule]],
        notes: Sequence[str] = (),
    ) -> None:
        self.title = title
        self.modules = tuple(modules)
        self.graphs = tuple(graphs)
        self.graph_modules = tuple(graph_modules)
        self.notes = tuple(notes)

    @property
    def is_cached(self) -> bool:
        """Whether every transformer has a graph that gets a conditional."""
        cached = {report.module for report in self.graphs if report.is_cached}
        return all(captured.module in cached for captured in self.modules)

    def index(self, index: int | None = None) -> int:
        """Returns a valid index in `graphs`: `index` itself, or the default of `graph` and `diff` for None.

        Raises:
            ConfigError: There is no graph with this index.
        """
        if index is None:
            order = sorted(self.graphs, key=lambda report: (report.is_cached, report.num_nodes))
            return self.graphs.index(order[-1]) if order else self.index(0)
        if not 0 <= index < len(self.graphs):
            raise ConfigError(f"cachedit_fx: index must be below {len(self.graphs)}, the number of graphs, got {index}")
        return index
