"""What a model's own code may need before its blocks can be matched: patch functors, and what they are made of."""

from __future__ import annotations

import difflib
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.module_calls import module_lists

_MISSING = object()


class PatchFunctor:
    """Brings a model that no template fits within reach of one. Both stages are optional; the base class does nothing.

    A subclass overrides `prepare`, for a model that Dynamo cannot capture whole, or `apply`, for a graph whose blocks
    hand on streams in a way that no template describes. `disable_cache` undoes both: the rewritten graph goes with the
    compiled code, and `restore` puts every replaced method back.
    """

    def __init__(self) -> None:
        self._replaced: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()

    def __eq__(self, other: object) -> bool:
        """Functors of one class with equal attributes do the same."""
        return isinstance(other, PatchFunctor) and type(self) is type(other) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash(type(self))

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_replaced"}

    def prepare(self, transformer: nn.Module) -> None:
        """Makes `transformer` capturable, by `replace_method` alone: outputs stay the same up to rounding."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Rewrites a captured graph before its blocks are looked for.

        Called for every graph that is captured: anew for another size, and for each part of a model that Dynamo broke
        up. One that lacks what is looked for is handed back as it is.

        Args:
            gm: A copy of what Dynamo captured; may be changed in place. Its nodes carry `example_value` and
                `nn_module_stack` in their `meta`, as Dynamo put them there.

        Returns:
            The graph to go on with. Placeholders must stay as they are, in number and order.
        """
        return gm

    def replace_method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Lets `module.name` be `function`, bound to this one module; its class and all other modules keep theirs.

        Raises:
            ConfigError: `module` has no method `name`.
        """
        if not callable(getattr(module, name, None)):
            near = difflib.get_close_matches(
                name, [name_of_class for name_of_class in dir(type(module)) if name_of_class[:1] != "_"], n=1
            )
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"cachedit_fx: {type(module).__name__} has no method {name!r} to replace{hint}")
        replaced = self._replaced.setdefault(module, {})
        replaced.setdefault(name, module.__dict__.get(name, _MISSING))
        module.__dict__[name] = types.MethodType(function, module)

    def restore(self, transformer: nn.Module) -> None:
        """Puts back what `replace_method` replaced in `transformer` and the modules inside it."""
        for module in transformer.modules():
            for name, before in self._replaced.pop(module, {}).items():
                if before is _MISSING:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = before


def give_to_block(nodes: Iterable[fx.Node], like: fx.Node) -> None:
    """Makes `nodes` part of the block that `like` belongs to.

    What stands between two blocks otherwise counts as the end of the earlier one; given to the later one, the cut
    lies in front of it.
    """
    for node in nodes:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]


def rename_stream(nodes: Iterable[fx.Node], name: str) -> None:
    """Calls the values that `nodes` make `name`, as if the model's code had: roles are told by names."""
    for node in nodes:
        node.meta["cachedit_name"] = name


def split_stream(node: fx.Node, sizes: Sequence[int | fx.Node | None], dim: int, names: Iterable[str]) -> list[fx.Node]:
    """Lets a joint stream cross a cut as several: sliced apart behind `node`, joined again for whoever reads it.

        x -> block      ->      a, b = x[:, :n], x[:, n:]; x = cat((a, b), dim) -> block

    Args:
        node: A tensor node between two blocks.
        sizes: Lengths along `dim`, one for each stream: numbers, nodes that compute them, and for the last None, which
            is what is left. Numbers hold for this graph alone; for any image size pass None.
        names: What the streams are called, as in `("encoder_hidden_states", "hidden_states")`.

    Returns:
        The slices. The join belongs to the block that reads it.

    Raises:
        ConfigError: A size is something else, the numbers don't add up to the length of `node`, or nothing reads it.
    """
    graph, whole = node.graph, node.meta["example_value"]
    if not node.users:
        raise ConfigError(
            f"cachedit_fx: nothing reads `{node.name}`, so there is no stream to split; give the node that a "
            "block reads"
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
    for part in parts:  # They read the stream itself.
        part.args = (node, *part.args[1:])
    return parts


def _check_sizes(node: fx.Node, sizes: Sequence[int | fx.Node | None], dim: int) -> None:
    length = node.meta["example_value"].shape[dim]
    for i, size in enumerate(sizes):
        if not isinstance(size, int | fx.Node) and not (size is None and i == len(sizes) - 1):
            raise ConfigError(
                f"cachedit_fx: sizes of `{node.name}` must be numbers or nodes, and the last may be None; "
                f"got {shown(size)}"
            )
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) == len(sizes) and sum(numbers) != length:
        raise ConfigError(
            f"cachedit_fx: sizes must add up to {length}, the length of `{node.name}` along dimension {dim}, got "
            f"{numbers}; give None as the last for what is left"
        )


def _sum(graph: fx.Graph, start: int | fx.Node, size: int | fx.Node) -> int | fx.Node:
    if isinstance(start, int) and (isinstance(size, int) or start == 0):
        return start + size if isinstance(size, int) else size
    total = graph.call_function(operator.add, (start, size))
    total.meta["example_value"] = operator.add(*fx.map_arg((start, size), lambda n: n.meta["example_value"]))
    return total


def block_nodes(gm: fx.GraphModule, path: str) -> list[list[fx.Node]]:
    """The nodes of each block of the list at `path` (as in `transformer_blocks`), in order; empty if it is not called.

    Work between two blocks is in neither of them.
    """
    program = Program(gm.graph)
    calls = module_lists(program).get(tuple(path.split(".")), [])
    return [[program.nodes[position] for position in call.positions] for call in calls]
