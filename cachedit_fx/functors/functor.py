"""The base class of patch functors, and functions that rewrite the streams of a captured graph."""

from __future__ import annotations

import difflib
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import fx, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.functors.module_functions import replace_module_function
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.module_calls import module_lists

_MISSING = object()


class PatchFunctor:
    """Changes a model or its captured graph so that a template fits. The base class does nothing.

    A subclass overrides `prepare` for a model that Dynamo cannot capture whole, or `apply` for a graph whose blocks
    pass streams in a way that no template describes. Both are optional. `disable_cache` undoes both: the rewritten
    graph is removed together with the compiled code, and `restore` puts every replaced method and function back.
    """

    def __init__(self) -> None:
        self._replaced: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
        self._functions: WeakKeyDictionary[nn.Module, list[finalize[Any, nn.Module]]] = WeakKeyDictionary()

    def __eq__(self, other: object) -> bool:
        """Returns whether both functors have the same class and equal attributes, and hence do the same."""
        return isinstance(other, PatchFunctor) and type(self) is type(other) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash(type(self))

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_replaced", "_functions")}

    def prepare(self, transformer: nn.Module) -> None:
        """Replaces what Dynamo cannot capture, by `replace_method` and `replace_function` only.

        The outputs of the model must stay the same up to rounding.
        """

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Rewrites a captured graph before its blocks are located.

        This method is called for every captured graph: again for another size, and for each part of a model that
        Dynamo broke up. It must return a graph unchanged if it does not contain the code to rewrite.

        Args:
            gm: A copy of the graph that Dynamo captured. It may be changed in place. The `meta` of its nodes contains
                `example_value` and `nn_module_stack` from Dynamo.

        Returns:
            The rewritten graph. The number and order of its placeholders must not change.
        """
        return gm

    def replace_method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Replaces `module.name` by `function`, bound to this module. Its class and other modules do not change.

        Raises:
            ConfigError: `module` has no method `name`.
        """
        if not callable(getattr(module, name, None)):
            near = difflib.get_close_matches(name, [public for public in dir(type(module)) if public[:1] != "_"], n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"cachedit_fx: {type(module).__name__} has no method {name!r} to replace{hint}")
        replaced = self._replaced.setdefault(module, {})
        replaced.setdefault(name, module.__dict__.get(name, _MISSING))
        module.__dict__[name] = types.MethodType(function, module)

    def replace_function(self, transformer: nn.Module, place: str, function: Callable[..., Any]) -> None:
        """Replaces a function of a Python module by `function`, in the code that Dynamo traces.

        Code that is not traced calls the original, also if it belongs to another model.

        Args:
            transformer: The model for which it is replaced, until `restore` or until the model is deleted.
            place: `"package.module:function"`: the Python module in which the code that calls the function finds it,
                and its name there. Without a module, it is the module in which the class of `transformer` is defined.
            function: Takes the same arguments. All models that replace a function must replace it by the same one.

        Raises:
            ConfigError: There is no such function, or another model has replaced it by another function.
        """
        self._functions.setdefault(transformer, []).append(replace_module_function(transformer, place, function))

    def restore(self, transformer: nn.Module) -> None:
        """Restores what `replace_method` and `replace_function` replaced for `transformer` and the modules inside it.

        A function that another model has replaced as well is restored after that model.
        """
        for module in transformer.modules():
            for release in self._functions.pop(module, ()):
                release()
            for name, before in self._replaced.pop(module, {}).items():
                if before is _MISSING:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = before


def give_to_block(nodes: Iterable[fx.Node], like: fx.Node) -> None:
    """Makes `nodes` part of the block that `like` belongs to.

    By default, nodes between two blocks are part of the earlier block. If they are given to the later block, the cut
    is before them.
    """
    for node in nodes:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]


def rename_stream(nodes: Iterable[fx.Node], name: str) -> None:
    """Gives the values of `nodes` the name `name`, as if the code of the model did, to assign a role to a stream."""
    for node in nodes:
        node.meta["cachedit_name"] = name


def split_stream(node: fx.Node, sizes: Sequence[int | fx.Node | None], dim: int, names: Iterable[str]) -> list[fx.Node]:
    """Splits a joint stream, so that it crosses a cut as several streams.

    The value of `node` is sliced, and the slices are joined again for the nodes that read it:

        x -> block      ->      a, b = x[:, :n], x[:, n:]; x = cat((a, b), dim) -> block

    Args:
        node: A tensor node between two blocks.
        sizes: The length of each stream along `dim`: a number, a node that computes it, or, for the last stream, None,
            which means the rest. A number is valid for this graph only; pass None to support any image size.
        dim: The dimension to split.
        names: The name of each stream, such as `("encoder_hidden_states", "hidden_states")`.

    Returns:
        The slices. The join belongs to the block that reads it.

    Raises:
        ConfigError: A size is none of these, the numbers do not add up to the length of `node`, or no node reads it.
    """
    graph, whole = node.graph, node.meta["example_value"]
    if not node.users:
        raise ConfigError(
            f"cachedit_fx: no node reads `{node.name}`, so there is no stream to split; pass the node that a block "
            "reads"
        )
    _check_sizes(node, sizes, dim)
    readers = list(node.users)
    first = min(readers, key=list(graph.nodes).index)
    parts: list[fx.Node] = []
    with graph.inserting_before(first), torch.no_grad():
        start: int | fx.Node = 0
        for size, name in zip(sizes, names, strict=True):
            stop = None if size is None or len(parts) == len(sizes) - 1 else _sum(graph, start, size)
            where = (*[slice(None)] * (dim % whole.dim()), slice(start, stop))
            part = graph.call_function(operator.getitem, (node, where))
            example = whole[fx.map_arg(where, lambda n: n.meta["example_value"])]
            part.meta = {**node.meta, "example_value": example, "cachedit_name": name}
            parts.append(part)
            start = stop if stop is not None else start
        joined = graph.call_function(torch.cat, (tuple(parts), dim))
        joined.meta = {**first.meta, "example_value": torch.cat([part.meta["example_value"] for part in parts], dim)}
    for reader in readers:
        reader.replace_input_with(node, joined)
    for part in parts:  # The slices read the stream itself.
        part.args = (node, *part.args[1:])
    return parts


def _check_sizes(node: fx.Node, sizes: Sequence[int | fx.Node | None], dim: int) -> None:
    length = node.meta["example_value"].shape[dim]
    for i, size in enumerate(sizes):
        if not isinstance(size, int | fx.Node) and not (size is None and i == len(sizes) - 1):
            raise ConfigError(
                f"cachedit_fx: sizes of `{node.name}` must be numbers or nodes (the last one may be None), got "
                f"{shown(size)}"
            )
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) == len(sizes) and sum(numbers) != length:
        raise ConfigError(
            f"cachedit_fx: sizes must add up to {length}, the length of `{node.name}` along dimension {dim}, got "
            f"{numbers}; pass None as the last size for the rest"
        )


def _sum(graph: fx.Graph, start: int | fx.Node, size: int | fx.Node) -> int | fx.Node:
    if isinstance(start, int) and (isinstance(size, int) or start == 0):
        return start + size if isinstance(size, int) else size
    total = graph.call_function(operator.add, (start, size))
    total.meta["example_value"] = operator.add(*fx.map_arg((start, size), lambda n: n.meta["example_value"]))
    return total


def block_nodes(gm: fx.GraphModule, path: str) -> list[list[fx.Node]]:
    """Returns the nodes of each block of the list at `path` (such as `transformer_blocks`), in execution order.

    The result is empty if no block of the list is called. Nodes between two blocks are in neither of them.
    """
    program = Program(gm.graph)
    calls = module_lists(program).get(tuple(path.split(".")), [])
    return [[program.nodes[position] for position in call.positions] for call in calls]
