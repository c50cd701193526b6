"""The shape of a pass, and what the passes over one graph share."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.passes.observer import Observer
from cachedit_fx.patterns.declaration import Declaration

if TYPE_CHECKING:
    from cachedit_fx.passes.analysis.runtime_plan import RuntimePlan
    from cachedit_fx.passes.piece import Piece
    from cachedit_fx.passes.plan import Plan


@dataclass(slots=True)
class PassContext:
    """What the passes over one graph know besides the graph.

    Attributes:
        config: The configuration of the whole model.
        declared: What the user declared about the blocks.
        exact: Whether the rewritten graph must round as the captured graph does.
        observer: Is notified of every result.
        plan: The result of `MakePlan`.
        runtime_plan: The result of `MakeRuntimePlan`.
        pieces: The result of `SplitPieces`.
    """

    config: CacheConfig = field(default_factory=CacheConfig)
    declared: Declaration = field(default_factory=Declaration)
    exact: bool = False
    observer: Observer = field(default_factory=Observer)
    plan: Plan | None = None
    runtime_plan: RuntimePlan | None = None
    pieces: tuple[Piece, ...] = ()


class GraphPass(PassBase):
    """One rewrite of a graph.

    A pass has no state of its own. It gets a graph that lints, and returns one that lints. `requires` and `ensures`
    check, by assertions, what the pass expects of the graph it is given and what later passes expect of its result.

    Attributes:
        name: The name in dumps, logs and errors, in kebab case.
    """

    name: ClassVar[str]

    def __init__(self, context: PassContext | None = None) -> None:
        self.context = context or PassContext()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs `requires`, `call` and `ensures`. Unlike in the base class, `ensures` gets the graph of the result."""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    @abc.abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The rewritten graph, which may be the same object, and whether anything changed."""


class GraphAnalysis(abc.ABC):
    """A step that only reads a graph, and that adds its result to the context.

    Attributes:
        name: The name in logs and errors, in kebab case.
    """

    name: ClassVar[str]

    def __init__(self, context: PassContext) -> None:
        self.context = context

    @abc.abstractmethod
    def __call__(self, graph_module: fx.GraphModule) -> None:
        """Reads the graph.

        Raises:
            MismatchError: The graph cannot be cached.
        """
