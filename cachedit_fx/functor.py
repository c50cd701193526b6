"""What a model's own code may need before its blocks can be matched: patch functors, and what they are made of."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from cachedit_fx.errors import ConfigError

_MISSING = object()


class PatchFunctor:
    """Brings a model that no template fits within reach of one. Both stages are optional; the base class does nothing.

    A subclass overrides `prepare`, for a model that Dynamo cannot capture whole, or `apply`, for a graph whose blocks
    hand on streams in a way that no template describes. `disable_cache` undoes both: the rewritten graph goes with the
    compiled code, and `restore` puts every replaced method back.
    """

    def __init__(self) -> None:
        self._replaced: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()

    def prepare(self, transformer: nn.Module) -> None:
        """Makes `transformer` capturable, by `replace_method` alone: outputs stay the same up to rounding."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Rewrites a captured graph before its blocks are looked for.

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
            raise ConfigError(f"cachedit_fx: {type(module).__name__} has no method {name!r} to replace")
        kept = self._replaced.setdefault(module, {})
        kept.setdefault(name, module.__dict__.get(name, _MISSING))
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


def split_stream(node: fx.Node, sizes: Iterable[int], dim: int, names: Iterable[str]) -> list[fx.Node]:
    """Lets a joint stream cross a cut as several: sliced apart behind `node`, joined again for whoever reads it.

        x -> block      ->      a, b = x.split(sizes, dim); x = cat((a, b), dim) -> block

    Args:
        node: A tensor node between two blocks.
        sizes: Lengths along `dim`, one for each stream; they add up to that of `node`.
        names: What the streams are called, as in `("encoder_hidden_states", "hidden_states")`.

    Returns:
        The slices. The join belongs to the block that reads it.

    Raises:
        ConfigError: The sizes don't add up to the length of `node` along `dim`.
    """
    graph, value = node.graph, node.meta["example_value"]
    sizes = list(sizes)
    if sum(sizes) != value.shape[dim]:
        raise ConfigError(f"cachedit_fx: sizes {sizes} don't add up to {value.shape[dim]}, the length of `{node.name}`")
    readers = list(node.users)
    parts, start = [], 0
    with graph.inserting_after(node), torch.no_grad():
        for size, name in zip(sizes, names, strict=True):
            part = graph.call_function(torch.narrow, (node, dim, start, size))
            part.meta = {**node.meta, "example_value": value.narrow(dim, start, size), "cachedit_name": name}
            parts.append(part)
            start += size
    first = min(readers, key=list(graph.nodes).index)
    with graph.inserting_before(first), torch.no_grad():
        whole = graph.call_function(torch.cat, (tuple(parts), dim))
        whole.meta = {**first.meta, "example_value": torch.cat([part.meta["example_value"] for part in parts], dim)}
    for reader in readers:
        reader.replace_input_with(node, whole)
    return parts
