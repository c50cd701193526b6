"""Applies the patch functor that the user declared, if there is one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx.errors import PatternError, cut
from cachedit_fx.passes.graph_pass import GraphPass


class ApplyFunctor(GraphPass):
    """Replaces the graph by what the patch functor returns.

    Raises:
        PatternError: The functor raised, returned a graph that does not lint, or changed the inputs of the graph.
    """

    name = "apply-functor"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        functor = self.context.declared.functor
        if functor is None:
            return PassResult(graph_module, False)
        name = type(functor).__name__
        before = _inputs(graph_module)
        try:
            rewritten = functor.apply(graph_module)
            rewritten.graph.lint()
        except Exception as error:
            raise PatternError(
                f"cachedit_fx: patch functor `{name}` failed on the captured graph: {type(error).__name__}: "
                f"{cut(error)}\n"
                "What to do: correct its `apply`. It must return a graph without what it looks for unchanged."
            ) from error
        if _inputs(rewritten) != before:
            raise PatternError(
                f"cachedit_fx: patch functor `{name}` must leave the graph's inputs as they are, in number and order.\n"
                f"  expected: the {len(before)} that were captured\n"
                f"  found:    {_changed(before, _inputs(rewritten))}\n"
                "What to do: compute new values from the existing inputs in its `apply`."
            )
        return PassResult(rewritten, True)


def _changed(before: Sequence[str], after: Sequence[str]) -> str:
    """How the inputs of a graph differ, for example `1 added (mask)`."""
    changes = {"added": [n for n in after if n not in before], "gone": [n for n in before if n not in after]}
    said = [f"{len(names)} {how} ({cut(', '.join(names))})" for how, names in changes.items() if names]
    return ", ".join(said) or "another order"


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
