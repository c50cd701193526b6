"""The trace of a block: recorded while Dynamo traces it, and repeated for a block that is like it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from cachedit_fx.frontend.block_arguments import Arguments, arguments_of, is_unchanged, metadata_of, storage_of
from cachedit_fx.frontend.block_guards import CHECKS, BlockGuard, guards_below
from cachedit_fx.frontend.trace_internals import (
    ModuleCall,
    SourceMap,
    SourcesBelow,
    UnknownError,
    content_of,
    guard_with,
    is_number_of_frame,
    name_of,
    realized,
    source_of_input,
    source_of_number,
    symbols_of,
    tuple_of,
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BlockRecorder:
    """Observes how Dynamo traces a block.

    Raises:
        UnknownError: The trace cannot be repeated.
    """

    def __init__(self, call: ModuleCall) -> None:
        self._call = call
        _check(call)
        self._arguments = arguments_of(call)
        self._state, self._changes, self._num_calls = call.state(), call.changes(), dict(call.num_calls)
        self._before, self._guards = {*call.graph.nodes}, {*call.guards()}

    def finish(self, result: Any, values: dict[Any, Any]) -> BlockTrace:
        """What is needed to repeat the trace of the block, after Dynamo has traced it.

        Args:
            values: What is known of the values at sources.
        """
        call, before = self._call, self._arguments
        _check(call)
        arguments = arguments_of(call)
        if not is_unchanged(before.kind, arguments.kind):
            raise UnknownError("it changes its arguments")
        changes = call.changes()
        if call.state() != self._state or any(changes.get(one) != found for one, found in self._changes.items()):
            raise UnknownError("it changes the settings of torch, or an object")
        is_below = SourcesBelow(call.source)
        nodes = [node for node in call.graph.nodes if node.op != "placeholder" and node not in self._before]
        weights = [node for node in call.graph.find_nodes(op="placeholder") if _is_weight(node, is_below)]
        numbers = [node for node in nodes if is_number_of_frame(node)]
        _check_nodes(nodes, {*arguments.nodes, *weights, *nodes}, call.module, is_below)
        fixed = _fixed_numbers(call, numbers, nodes)
        num_calls = {path: n for path, n in call.num_calls.items() if n != self._num_calls.get(path, 0)}
        if not all(_is_in(path, call.path) and not self._num_calls.get(path, 0) for path in num_calls):
            raise UnknownError("it calls a module that is outside of it, or is called twice")
        own = {node.meta["nn_module_stack"].get(str(id(call.module))) for node in nodes}
        if own != {(call.path, type(call.module))}:
            raise UnknownError("Dynamo records the calls of modules in another way")
        _check_result(result, arguments, nodes)
        guards = guards_below(call, is_below, self._guards, values)
        ordered = {source: [*call.value_at(source, values)] for source in call.ordered_dicts if is_below(source)}
        return BlockTrace(call, arguments, nodes, weights, fixed, is_below, guards, ordered, num_calls, result)


def _check(call: ModuleCall) -> None:
    if not call.is_at_top:
        raise UnknownError("it is called within a higher-order operator")
    if any(getattr(module, name) for module in call.module.modules() for name in _HOOKS):
        raise UnknownError("it has hooks")
    call.check_effects()


def _check_result(result: Any, arguments: Arguments, nodes: list[fx.Node]) -> None:
    if any(result is leaf for leaf in arguments.leaves):
        return
    kind, content = content_of(result)
    if kind == "tuple":
        for item in content:
            _check_result(item, arguments, nodes)
    elif kind != "constant" and not (kind == "tensor" and content in nodes):
        raise UnknownError(f"it returns a variable of another kind ({kind})")


def _is_weight(placeholder: fx.Node, is_below: SourcesBelow) -> bool:
    source = source_of_input(placeholder)
    return source is not None and is_below(source)


def _fixed_numbers(call: ModuleCall, numbers: list[fx.Node], nodes: list[fx.Node]) -> dict[fx.Node, bool]:
    """Whether the graph is specialized on each of the numbers that Dynamo passes as tensors.

    Raises:
        UnknownError: Sizes, other numbers or guards depend on one on which it is not.
    """
    symbols = {node: symbols_of(node.meta["example_value"]) for node in numbers}
    free = set().union(*symbols.values())
    if free:
        rest = (node.meta.get("example_value") for node in nodes if node not in symbols)
        if free & call.guarded_symbols or any(free & symbols_of(value) for value in rest):
            raise UnknownError("a size, a number or a guard depends on a number that it reads")
    return {node: not found for node, found in symbols.items()}


def _check_nodes(nodes: list[fx.Node], known: set[fx.Node], block: nn.Module, is_below: SourcesBelow) -> None:
    held, own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}, {*nodes}
    for node in nodes:
        is_call = node.op in ("call_function", "call_method")
        has_value = "example_value" in node.meta or (node.target is operator.setitem and node.args[0] in own)
        if not is_call or not has_value or node.meta.get("unbacked_bindings"):
            raise UnknownError(f"its graph contains {node.op}")
        for arg in node.all_input_nodes:
            if is_number_of_frame(node) or arg in known or isinstance(arg.meta.get("example_value"), torch.SymInt):
                continue  # A size follows from the sizes of the arguments, and Dynamo has one node for it.
            if is_number_of_frame(arg) and not is_below(source_of_number(arg)):
                continue  # Dynamo has one node for it, too.
            source = source_of_input(arg) if arg.op == "placeholder" else None
            if source is None or id(arg.meta["grapharg"].example) in held:
                raise UnknownError("it reads a value that is neither passed to it nor one of its weights")


class BlockTrace:
    """The trace of a block, which other blocks can repeat."""

    def __init__(
        self,
        call: ModuleCall,
        arguments: Arguments,
        nodes: list[fx.Node],
        weights: list[fx.Node],
        numbers: dict[fx.Node, bool],
        is_below: SourcesBelow,
        guards: list[BlockGuard],
        ordered: dict[Any, list[Any]],
        num_calls: dict[str, int],
        result: Any,
    ) -> None:
        self._source, self._path, self._modules = call.source, call.path, [*call.module.named_modules()]
        self._place, self._state, self._stack = call.place, call.state(), call.module_stack
        self._arguments, self._nodes, self._guards, self._num_calls = arguments, nodes, guards, num_calls
        self._ordered = ordered  # The keys of the dictionaries the order of whose keys is checked.
        self._weights = {node: source_of_input(node) for node in weights}
        # The numbers that Dynamo passes as tensors, and whether the graph is specialized on each. Those that are not
        # below the block are read once.
        self._numbers = {node: is_fixed for node, is_fixed in numbers.items() if is_below(source_of_number(node))}
        placeholders = {node.args[0]: node for node in self._numbers} | {node: node for node in weights}
        self._inputs = [placeholders[node] for node in call.graph.nodes if node in placeholders]
        self._shared = {node: node for node in numbers if node not in self._numbers}
        self._values = {node: call.value_at(source_of_number(node), {}) for node in self._numbers}
        self._result = result

    def repeat(self, call: ModuleCall, values: dict[Any, Any]) -> Any:
        """The output of another block, after everything that Dynamo's trace of it would have added is added.

        Args:
            values: What is known of the values at sources.

        Raises:
            UnknownError: It cannot be shown that Dynamo would trace the same. Nothing has been added.
        """
        arguments = self._check(call)
        sources = SourceMap(self._source, call.source)
        self._check_guards(call, sources, values)
        weights = {node: call.value_at(sources(source), values) for node, source in self._weights.items()}
        if any(map(call.is_tracked, weights.values())) or len({*map(id, weights.values())}) < len(weights):
            raise UnknownError("it shares a weight")
        numbers = self._numbers_of(call, sources, values)
        inputs = dict(zip(self._arguments.nodes, arguments.nodes, strict=True))
        before = {*call.graph.nodes}
        try:
            for node in self._inputs:  # In the order in which Dynamo adds them.
                if node in weights:
                    inputs[node] = call.add_input(sources(self._weights[node]), weights[node])
                else:
                    source, is_fixed = sources(source_of_number(node)), self._numbers[node]
                    inputs[node] = call.add_number(source, numbers[node], is_fixed=is_fixed)
            nodes = self._copy_nodes(call, inputs | self._shared)
            result = self._rebuild(self._result, call, arguments, nodes)
            for one in self._guards:
                if one.kind != "TENSOR_MATCH":  # `add_input` adds these.
                    parameters = {name: _mapped(value, sources) for name, value in one.parameters.items()}
                    call.add_guard(one.guard, sources(one.source), guard_with(one.guard, parameters))
        except BaseException:
            for node in reversed([node for node in call.graph.nodes if node not in before]):
                if node.op != "placeholder" and not is_number_of_frame(node):  # Dynamo has variables for these.
                    call.remove_node(node)
            raise
        call.ordered_dicts.update(map(sources, self._ordered))
        for path, count in self._num_calls.items():
            call.num_calls[call.path + path.removeprefix(self._path)] = count
        return result

    def _numbers_of(self, call: ModuleCall, sources: SourceMap, values: dict[Any, Any]) -> dict[fx.Node, float]:
        """The numbers that Dynamo passes as tensors."""
        found = {node: call.value_at(sources(source_of_number(node)), values) for node in self._numbers}
        for node, value in found.items():
            if type(value) is not float or not math.isfinite(value):
                raise UnknownError(f"{name_of(sources(source_of_number(node)))} is not a finite number")
            if self._numbers[node] and value != self._values[node]:
                raise UnknownError(f"{name_of(sources(source_of_number(node)))} differs")
        return found

    def _check(self, call: ModuleCall) -> Arguments:
        _check(call)
        if call.place != self._place or call.state() != self._state:
            raise UnknownError("it is called elsewhere, or with other settings of torch")
        if any(_is_in(path, call.path) and count for path, count in call.num_calls.items()):
            raise UnknownError("it has been called before")
        modules = [*call.module.named_modules()]
        if [(name, type(one)) for name, one in modules] != [(name, type(one)) for name, one in self._modules]:
            raise UnknownError("it has other submodules")
        arguments = arguments_of(call)
        if arguments.kind != self._arguments.kind and arguments.unread:
            for variable in arguments.unread:
                realized(variable)
            arguments = arguments_of(call)
        if arguments.kind != self._arguments.kind:
            raise UnknownError("its arguments differ")
        return arguments

    def _check_guards(self, call: ModuleCall, sources: SourceMap, values: dict[Any, Any]) -> None:
        for one in self._guards:
            source = sources(one.source)
            try:
                value = call.value_at(source, values)
            except (AttributeError, LookupError) as error:
                raise UnknownError(f"there is no {name_of(source)}") from error
            old = one.value
            if one.kind == "DUPLICATE_INPUT":
                old, source = value, sources(one.parameters["source_b"])
                value = call.value_at(source, values)
            if not CHECKS[one.kind](old, value, one.parameters):
                raise UnknownError(f"{name_of(source)} differs ({one.kind})")
        for old_source, keys in self._ordered.items():
            if [*call.value_at(sources(old_source), values)] != keys:
                raise UnknownError(f"{name_of(sources(old_source))} has other keys")

    def _copy_nodes(self, call: ModuleCall, inputs: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """The copies of the nodes of the recorded block."""
        copies, examples = dict(inputs), _Examples(call.fake_mode)
        for node, copy in inputs.items():
            if node in self._numbers or node in self._shared:
                continue
            examples.know(node.meta["example_value"], copy.meta["example_value"])
        stack_of = self._stacks(call)
        for node in self._weights:
            copies[node].meta |= {"nn_module_stack": stack_of(node), "stack_trace": node.stack_trace}
        for node in self._nodes:
            if node in self._shared:
                continue
            if node in self._numbers:
                self._place_number(call, node, copies[node], stack_of)
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: copies.get(arg, arg))
            copy = copies[node] = call.add_node(node, args, kwargs)
            name, timestamp = copy.name, copy.meta.get("creation_timestamp")
            copy.meta = {**node.meta, "creation_timestamp": timestamp, "nn_module_stack": stack_of(node)}
            _copy_function_stack(node, copy)
            if _stem(node.name) != _stem(name):
                copy._rename(_stem(node.name))  # As Dynamo does when a value is assigned to a variable.
            if "example_value" in node.meta:  # Not of `x[...] = y`.
                copy.meta["example_value"] = examples.copy(node, args, kwargs)
        return copies

    def _place_number(self, call: ModuleCall, node: fx.Node, copy: fx.Node, stack_of: Callable[..., Any]) -> None:
        """Places the node that reads a number where the recorded block has its own."""
        call.move_to_end(copy)
        for old, new in ((node, copy), (node.all_input_nodes[0], copy.all_input_nodes[0])):
            new.meta |= {"stack_trace": old.stack_trace}
            if "nn_module_stack" in old.meta:
                new.meta["nn_module_stack"] = stack_of(old)
        _copy_function_stack(node, copy)

    def _stacks(self, call: ModuleCall) -> Callable[[fx.Node], dict[str, Any]]:
        """A function that returns the `nn_module_stack` for the copy of a node."""
        pairs = zip(self._modules, call.module.named_modules(), strict=True)
        numbers = {str(id(old)): str(id(new)) for (_, old), (_, new) in pairs}
        known: dict[tuple[str, ...], dict[str, Any]] = {}

        def stack_of(node: fx.Node) -> dict[str, Any]:
            stack = node.meta.get("nn_module_stack", {})
            if tuple(stack) not in known:
                new = known[tuple(stack)] = call.module_stack
                for key, (path, cls) in stack.items():
                    if key not in self._stack:
                        number, at, count = key.partition("@")
                        moved = call.path + path.removeprefix(self._path) if _is_in(path, self._path) else path
                        new[numbers.get(number, number) + at + count] = (moved, cls)
            return dict(known[tuple(stack)])

        return stack_of

    def _rebuild(self, result: Any, call: ModuleCall, arguments: Arguments, nodes: dict[fx.Node, fx.Node]) -> Any:
        """The output of the other block."""
        for old, new in zip(self._arguments.leaves, arguments.leaves, strict=True):
            if result is old:
                return new
        kind, content = content_of(result)
        if kind == "tensor":
            return call.tensor(nodes[content], result.unwrap())
        if kind == "constant":
            return result
        assert kind == "tuple"
        return tuple_of([self._rebuild(item, call, arguments, nodes) for item in content])


def _copy_function_stack(node: fx.Node, copy: fx.Node) -> None:
    if "source_fn_stack" in node.meta:
        *outer, (_, function) = node.meta["source_fn_stack"]
        copy.meta["source_fn_stack"] = [*outer, (copy.name, function)]


def _mapped(value: Any, sources: SourceMap) -> Any:
    return value if isinstance(value, str | int | None) else sources(value)


def _is_in(path: str, block: str) -> bool:
    return f"{path}.".startswith(f"{block}.")


def _stem(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


class _Examples:
    """Makes the example values of copied nodes. Those that share memory are copied to values that share memory."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._values: dict[int, Any] = {}
        self._storages: dict[int, Any] = {}

    def know(self, old: Any, new: Any) -> None:
        """Makes `new` the copy of `old`."""
        self._values[id(old)] = new
        if isinstance(old, torch.Tensor):
            self._storages.setdefault(storage_of(old), new)

    def copy(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The example value of a copy of `node`, whose inputs have been copied."""
        value = node.meta["example_value"]
        return pytree.tree_map(lambda one: self._copy(one, node, args, kwargs), value)

    def _copy(self, value: Any, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        new = self._values.get(id(value))
        if new is None:
            kind, base = metadata_of(value), self._storages.get(storage_of(value))
            with self._mode:
                if base is None and not value.storage_offset():
                    new = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
                elif base is not None and base.dtype == value.dtype:
                    new = base.as_strided(value.size(), value.stride(), value.storage_offset())
                else:  # A view with another dtype.
                    args, kwargs = fx.map_arg((args, kwargs), lambda arg: arg.meta["example_value"])
                    call = node.target if callable(node.target) else getattr(args[0], str(node.target))
                    new = call(*(args if callable(node.target) else args[1:]), **kwargs)
            if not isinstance(new, torch.Tensor) or metadata_of(new) != kind:
                raise UnknownError(f"the output of {node.name} cannot be copied")
            self.know(value, new)
        return new
