"""The private names of Dynamo that are needed to repeat a part of a trace. See `torch_internals` for all others.

`frontend/repeated_blocks.py` alone uses this module. A version of torch that lacks a name, or in which a name means
something else, raises an error in one of the functions below; every block is then traced. The names were looked up in
the sources of torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.torch_internals import own_kwargs

Variable = Any  # A `VariableTracker`: what Dynamo knows of a value during a trace.
Source = Any  # Where a value of the frame comes from.


class UnknownError(Exception):
    """Something that occurs in a trace cannot be repeated. The text completes a sentence that ends with `because`."""


class ModuleCall:
    """A call of a module that Dynamo is tracing.

    Uses `VariableTracker.source`, `InstructionTranslator.output`, `parent`, `f_code`, `lineno`, `nn_module_stack` and
    `num_calls`, and `OutputGraph.current_tracer`, `root_tracer`, `guards`, `guard_on_key_order`,
    `side_effects` and `random_calls`.

    Attributes:
        module: The module.
        proceed: Traces the call and returns its output.
        trace: The object of which there is one per trace.
        source: Where the module comes from.
        variables: The arguments, by position and name.
        place: The lines of code at which the call is made, innermost first.
    """

    def __init__(
        self, variable: Variable, tx: Any, args: list[Variable], kwargs: dict[str, Variable], proceed: Callable[[], Any]
    ) -> None:
        self.module: nn.Module = variable.value
        self.proceed, self._variable = proceed, variable
        self.tx, self.trace, self.source = tx, tx.output, variable.source
        self.variables: dict[int | str, Variable] = dict(enumerate(args))
        self.variables.update(kwargs)

    @property
    def place(self) -> tuple[Any, ...]:
        found, frame = [], self.tx
        while frame is not None:
            found.append((frame.f_code, frame.lineno))
            frame = getattr(frame, "parent", None)
        return tuple(found)

    @property
    def path(self) -> str:
        """The path of the module that Dynamo writes into `meta["nn_module_stack"]`."""
        text = str(self._variable.get_nn_module_stack_source().name)
        return re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", text)

    @property
    def is_at_top(self) -> bool:
        """Whether the nodes of the call are added to the graph itself, not to that of a higher-order operator."""
        return self.trace.current_tracer is self.trace.root_tracer

    @property
    def graph(self) -> fx.Graph:
        graph: fx.Graph = self.trace.current_tracer.graph
        return graph

    @property
    def module_stack(self) -> dict[str, tuple[str, type]]:
        """The calls of modules around this one: what Dynamo writes into `meta["nn_module_stack"]`."""
        return dict(self.tx.nn_module_stack)

    @property
    def num_calls(self) -> dict[str, int]:
        """The number of calls of each module so far, by the path that is in `meta["nn_module_stack"]`."""
        counts: dict[str, int] = self.tx.num_calls
        return counts

    def state(self) -> tuple[Any, ...]:
        """The global settings of torch on which the trace of a call may depend."""
        kinds = ("cpu", *({found.type} if (found := torch.accelerator.current_accelerator()) else ()))
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_cache_enabled(),
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
            *map(id, self.tx.symbolic_torch_function_state.mode_stack),
        )

    def check_effects(self) -> None:
        """Checks that nothing that existed before the trace has been changed in it, but the `**kwargs` of the forward.

        Raises:
            UnknownError: Something has. What a guard finds would not be what the trace has seen.
        """
        effects = self.trace.side_effects
        if effects.tensor_hooks or effects.save_for_backward or self.trace.random_calls:
            raise UnknownError("the forward registers hooks or draws random numbers in Python")
        changed = [*effects.store_attr_mutations]
        for variable in effects.id_to_variable.values():
            if getattr(variable.mutation_type, "is_modified", False):
                changed.append(variable)
        own = own_kwargs(self.trace.root_tx.f_code)
        for variable in changed:
            is_new = type(variable.mutation_type).__name__.endswith("New")
            if not is_new and getattr(variable.source, "name", None) != own:
                raise UnknownError("the forward changes an object that it did not create")

    def changes(self) -> dict[Any, tuple[int, ...]]:
        """The attributes of objects that have been set in the trace, as the identities of their values."""
        changes = self.trace.side_effects.store_attr_mutations
        return {variable: tuple(map(id, values.values())) for variable, values in changes.items()}

    def guards(self) -> list[Any]:
        """All guards so far."""
        return [*self.trace.guards]

    def add_guard(self, like: Any, source: Source, create: Callable[..., Any]) -> None:
        """Adds a guard on `source` that was made in the same lines of code as `like`."""
        guard = type(like)(source, create)
        guard.stack, guard.user_stack = like.stack, like.user_stack
        self.trace.guards.add(guard, collect_debug_stack=False)

    @property
    def ordered_dicts(self) -> set[Source]:
        """The sources of dictionaries the order of whose keys Dynamo checks, in addition to the guards."""
        sources: set[Source] = self.trace.guard_on_key_order
        return sources

    def value_at(self, source: Source, cache: dict[Source, Any]) -> Any:
        """The object that is at `source` before the call that is being traced.

        Args:
            cache: What was found for other sources.

        Raises:
            Exception: There is none.
        """
        frame = self.trace.root_tx
        return source.get_value({"G": frame.f_globals, "L": frame.f_locals}, {}, cache)

    def is_tracked(self, value: Any) -> bool:
        """Whether the trace has seen this object."""
        return value in self.trace.side_effects

    def add_input(self, source: Source, value: Any) -> fx.Node:
        """Makes a tensor an input of the graph, with the guards on it. Uses `VariableBuilder`."""
        from torch._dynamo.variables.builder import VariableBuilder

        node: fx.Node = VariableBuilder(self.tx, source)(value).as_proxy().node
        return node

    def add_number(self, source: Source, value: float, *, is_fixed: bool) -> fx.Node:
        """Makes a number an input of the graph, which is passed as a tensor. Uses `VariableBuilder`.

        Args:
            is_fixed: Whether the graph is specialized on the value.

        Returns:
            The node that reads the number from the tensor.

        Raises:
            UnknownError: The number is read before, or is no input.
        """
        from torch._dynamo.variables.builder import VariableBuilder

        before = {*self.graph.nodes}
        variable = realized(VariableBuilder(self.tx, source)(value))
        kind, node = content_of(variable)
        if kind != "size" or node in before or not is_number_of_frame(node):
            raise UnknownError(f"{name_of(source)} is not an input, or is read before")
        if is_fixed:
            float(node.meta["example_value"])  # Adds the guard.
        found: fx.Node = node
        return found

    def move_to_end(self, node: fx.Node) -> None:
        """Moves a node behind all others."""
        last = next(reversed(self.graph.nodes))
        if last is not node:
            last.append(node)

    @property
    def guarded_symbols(self) -> set[Any]:
        """The symbols that occur in guards on sizes and numbers. Uses `ShapeEnv.guards`."""
        return {symbol for guard in self.fake_mode.shape_env.guards for symbol in guard.expr.free_symbols}

    def add_node(self, like: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """Adds a node that calls what `like` calls, without metadata. Its name is the one that Dynamo would choose."""
        node: fx.Node = self.trace.current_tracer.create_node(like.op, like.target, args, kwargs)
        return node

    def remove_node(self, node: fx.Node) -> None:
        """Removes a node without users."""
        self.trace.current_tracer.remove_node(node)

    @property
    def fake_mode(self) -> Any:
        return self.trace.fake_mode

    def tensor(self, node: fx.Node, like: Variable) -> Variable:
        """The variable for a tensor that a node computes. Uses `wrap_fx_proxy`.

        Args:
            like: A variable. If its node has got the name of a Python variable, so has this one.
        """
        from torch._dynamo.variables.builder import wrap_fx_proxy

        example = node.meta.pop("example_value")  # `wrap_fx_proxy` sets it.
        variable: Any = wrap_fx_proxy(self.tx, self.trace.current_tracer.proxy(node), example_value=example)
        variable._is_name_set = like._is_name_set
        return variable


@contextlib.contextmanager
def intercepted_module_calls(handle: Callable[[ModuleCall], Variable]) -> Iterator[None]:
    """Lets `handle` trace the calls of modules in this thread's traces. It returns the output of the call.

    Uses `UnspecializedNNModuleVariable.call_function`, which is replaced until the end of the block. In other threads,
    it does what it did.
    """
    _replace_method()
    before = getattr(_handlers, "handle", None)
    _handlers.handle = handle
    try:
        yield
    finally:
        _handlers.handle = before
        _restore_method()


_handlers = threading.local()
_lock = released_in_child(threading.Lock())
_replaced: list[Callable[..., Any]] = []  # The method, once for each block that has replaced it.


def _replace_method() -> None:
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as ModuleVariable

    with _lock:
        original = _replaced[-1] if _replaced else ModuleVariable.call_function
        _replaced.append(original)
        if len(_replaced) > 1:
            return

        @functools.wraps(original)
        def call_function(self: Variable, tx: Any, args: Any, kwargs: dict[str, Variable]) -> Variable:
            handle = getattr(_handlers, "handle", None)
            if handle is None or type(self) is not ModuleVariable or self.source is None:
                return original(self, tx, args, kwargs)
            return handle(ModuleCall(self, tx, [*args], kwargs, lambda: original(self, tx, args, kwargs)))

        ModuleVariable.call_function = call_function  # type: ignore[method-assign]


def _restore_method() -> None:
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as ModuleVariable

    with _lock:
        original = _replaced.pop()
        if not _replaced:
            ModuleVariable.call_function = original  # type: ignore[method-assign]


# Variables


def realized(variable: Variable) -> Variable:
    """The variable behind one that Dynamo builds when it is first read. Adds the guards on it."""
    return variable.realize()


def is_unread(variable: Variable) -> bool:
    """Whether Dynamo has not built a variable yet, because nothing has read it."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    return isinstance(variable, LazyVariableTracker) and not variable.is_realized()


def content_of(variable: Variable) -> tuple[str, Any]:
    """What kind of variable it is, and what is in it.

    Returns:
        ("tensor", its node), ("size", its node), ("constant", its value), ("tuple", variables), ("list", variables) or
        ("dict", a dictionary of keys and variables), or ("same", the variable), which is like no other variable.

    Raises:
        UnknownError: Another kind of variable, which may be changed unnoticed.
    """
    from torch._dynamo import variables
    from torch._dynamo.variables.tensor import SymNodeVariable

    if is_unread(variable):
        return "same", variable.source
    variable = variable.unwrap()
    kind = type(variable)
    if kind in (variables.TensorVariable, SymNodeVariable):
        return ("tensor" if kind is variables.TensorVariable else "size"), variable.as_proxy().node
    if kind is variables.ConstantVariable:
        return "constant", variable.value
    if kind in (variables.TupleVariable, variables.ListVariable):
        return ("tuple" if kind is variables.TupleVariable else "list"), [*variable.items]
    if kind is variables.ConstDictVariable:
        return "dict", {key.vt.as_python_constant(): value for key, value in variable.items.items()}
    if variable.source is not None:  # It exists before the trace. `check_effects` finds changes to it.
        return "same", variable
    raise UnknownError(f"a {kind.__name__} is passed to it or returned by it")


def tuple_of(items: list[Variable]) -> Variable:
    """The variable for a new tuple."""
    from torch._dynamo.variables import TupleVariable

    return TupleVariable(items)


def is_input_of_frame(variable: Variable) -> bool:
    """Whether a variable has a source, so that guards may be added to it when it is read."""
    return variable.source is not None


# Guards and sources


def source_of(guard: Any) -> Source:
    return guard.originating_source


def source_of_input(placeholder: fx.Node) -> Source | None:
    """Where an input of the graph comes from; None if it is a number that Dynamo passes as a tensor."""
    arg = placeholder.meta.get("grapharg")
    return None if arg is None or arg.pass_arg_as_tensor else arg.source


def is_number_of_frame(node: fx.Node) -> bool:
    """Whether a node reads a number from an input of the graph, as which Dynamo passes it as a tensor."""
    if node.target != "item" or not isinstance(node.meta.get("example_value"), torch.SymFloat):
        return False
    arg = node.args[0].meta.get("grapharg") if isinstance(node.args[0], fx.Node) else None
    return arg is not None and arg.pass_arg_as_tensor


def source_of_number(node: fx.Node) -> Source:
    """Where a number that a node reads from an input comes from."""
    return node.args[0].meta["grapharg"].source  # type: ignore[union-attr]


def symbols_of(value: Any) -> set[Any]:
    """The symbols on which the sizes of a tensor, or a size or number, depend. Uses `free_symbols`."""
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return set().union(*map(free_symbols, pytree.tree_leaves(value)))


class SourceMap:
    """Finds the sources below one module that correspond to those below another.

    Uses the fields of the dataclasses that sources are.
    """

    def __init__(self, old: Source, new: Source) -> None:
        self._known: dict[Source, Source] = {old: new}

    def __call__(self, source: Source) -> Source:
        """The source that corresponds to `source`; `source` itself if it is not below the module."""
        found = self._known.get(source)
        if found is None:
            changes = {name: new for name, inner in _inner_sources(source) if (new := self(inner)) is not inner}
            found = self._known[source] = dataclasses.replace(source, **changes) if changes else source
        return found


class SourcesBelow:
    """Whether sources are below a module."""

    def __init__(self, module: Source) -> None:
        self._known: dict[Source, bool] = {module: True}

    def __call__(self, source: Source) -> bool:
        found = self._known.get(source)
        if found is None:
            found = self._known[source] = any(self(inner) for _, inner in _inner_sources(source))
        return found


def _inner_sources(source: Source) -> list[tuple[str, Source]]:
    values = ((field.name, getattr(source, field.name)) for field in dataclasses.fields(source) if field.init)
    return [(name, value) for name, value in values if dataclasses.is_dataclass(value) and hasattr(value, "get_value")]


def name_of(source: Source) -> str:
    return str(source.name)


def guard_of(guard: Any) -> tuple[str, dict[str, Any]]:
    """The name of the check, and its parameters."""
    create = guard.create_fn
    if not isinstance(create, functools.partial):
        return guard.create_fn_name(), {}
    if create.args:
        raise UnknownError(f"the parameters of a guard are not named ({guard.create_fn_name()})")
    return guard.create_fn_name(), dict(create.keywords)


def guard_with(guard: Any, parameters: Mapping[str, Any]) -> Callable[..., Any]:
    """What makes a guard of the same kind with these parameters."""
    create: Callable[..., Any] = guard.create_fn
    return functools.partial(create.func, **parameters) if isinstance(create, functools.partial) else create
