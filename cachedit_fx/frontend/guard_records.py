"""Records Dynamo's guards on one graph, and restores them in another process.

torch can serialize guards (`CompilePackage`, `aot_compile`), but not those on decorated forwards or on functions, which
every transformer of diffusers has. A record therefore has no values that a guard compares with. It has the sources of
the guards, and the text of every check that was made from them (`L['self'].heads == 24`). To restore the guards,
Dynamo makes them again from the objects of the new process. They fit if the texts are equal. Objects that Dynamo
compares by identity are described instead: functions by their name and code, modules, types and enums by their name.

The guards are on values, not on the code that Dynamo traced. A record therefore also has a digest of the files with
this code, and of the code objects that their names lead to.

This file uses private names of Dynamo that no other file uses: `OutputGraph` (`dump_guards_state`, `import_sources`,
`tracing_context.traced_code`), `OutputGraphCommon`, `CheckFunctionManager`, `GuardsSet`, `Guard`, the methods of guard
managers, and `_get_closure_vars`. If one is missing, nothing is recorded, and `save_compiled` states why.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cachedit_fx.errors import cut, shown
from cachedit_fx.frontend.graph_records import NotSavedError
from cachedit_fx.frontend.torch_internals import BackendCompilerFailed, Guards, Locals

_NO_CHECKS = ("SHAPE_ENV", "EMPTY_NN_MODULE_HOOKS_DICT")  # Of these, no check results.
_BY_TYPE = re.compile(r"^(___check_type_id\(.*), \d+\)")
_BY_IDENTITY = re.compile(r"^___check_obj_id\((.*), (\d+)\)")


@dataclasses.dataclass(frozen=True, slots=True)
class GuardRecord:
    """What is needed to make the guards on a graph again.

    Attributes:
        guards: Dynamo's `Guard` objects, without references to objects.
        key_order: The sources of dictionaries the order of whose keys is checked.
        sizes: Sources of inputs -> their sizes and strides.
        device: The default device, if one was set.
        builtins_name: The global by which the guards find the builtins.
        imports: Globals by which the guards find modules -> names of the modules.
        code: See `_describe_code`, for every piece of code that Dynamo traced.
        checks: The texts of all checks.
    """

    guards: tuple[Any, ...]
    key_order: frozenset[Any]
    sizes: dict[Any, Any]
    device: torch.device | None
    builtins_name: str | None
    imports: dict[str, str]
    code: tuple[tuple[str, str, str, str], ...]
    checks: tuple[str, ...] = ()


class Tracer:
    """Traces a function with Dynamo, and records the guards. The function does not run.

    Args:
        backend: Is called with the graph, as a backend of `torch.compile`. Its result is not used.
    """

    def __init__(self, backend: Callable[[Any, list[Any]], None]) -> None:
        self._backend = backend
        self._state: Any = None
        self._code: list[types.CodeType] = []
        self._imports: dict[str, str] = {}
        self._guards: list[Any] = []

    def __call__(
        self, function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool | None
    ) -> GuardRecord:
        """The record.

        Raises:
            NotSavedError: The guards cannot be recorded.
        """
        # Dynamo stores what it compiles with the code object. That of a copy is released with it.
        copied = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
            function.__closure__,
        )  # fmt: skip
        copied.__kwdefaults__ = function.__kwdefaults__
        optimized = torch._dynamo.optimize(
            self._compile, nopython=True, guard_export_fn=self._keep_guards, dynamic=dynamic
        )(copied)
        try:
            optimized(*args, **kwargs)
        except _Traced:
            pass
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, NotSavedError):
                raise error.inner_exception from None
            raise
        return self._record()

    def _compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output: Any = InstructionTranslator.current_tx().output
        self._state = output.dump_guards_state()
        self._imports = dict(output.import_sources)
        self._backend(gm, example_inputs)
        self._code = list(output.tracing_context.traced_code)
        return _stop

    def _keep_guards(self, guards: Iterable[Any]) -> None:
        self._guards = list(guards)

    def _record(self) -> GuardRecord:
        state = self._state
        if state is None:
            raise NotSavedError("Dynamo captured no graph")
        if state.torch_function_mode_stack or state.functorch_layers:
            raise NotSavedError("a torch function mode or a functorch transform is active")
        for guard in self._guards:
            if guard.create_fn_name() == "SHAPE_ENV" and guard.code_list:
                raise NotSavedError("its sizes are dynamic")
        return GuardRecord(
            guards=tuple(_bare(guard) for guard in self._guards if guard.create_fn_name() not in _skipped()),
            key_order=frozenset(state.guard_on_key_order),
            sizes=dict(state.input_source_to_sizes_strides),
            device=state.current_device,
            builtins_name=state.name_of_builtins_dict_key_in_fglobals,
            imports=self._imports,
            code=tuple(_describe_code(*name) for name in sorted({*map(_name_of, self._code)})),
        )


def complete_record(record: GuardRecord, function: types.FunctionType, frame: Locals) -> GuardRecord:
    """The record with the texts of the checks.

    Raises:
        NotSavedError: A check compares with an object that cannot be described, or fails.
    """
    _, checks = _make_guards(record, function, frame)
    return dataclasses.replace(record, checks=tuple(checks))


def restore_guards(record: GuardRecord, function: types.FunctionType, frame: Locals) -> Guards:
    """The guards on `function`, made from the objects in `frame`, the locals of a call.

    Raises:
        NotSavedError: They do not fit the record, or do not hold.
    """
    for described in record.code:
        if _describe_code(*described[:2]) != described:
            raise NotSavedError(f"the code of {described[0]}.{described[1]} has changed")
    guards, checks = _make_guards(record, function, frame)
    for found, wanted in zip(checks, record.checks, strict=False):
        if found != wanted:
            raise NotSavedError(f"a value differs: {_difference(found, wanted)}")
    if len(checks) != len(record.checks):
        raise NotSavedError(f"Dynamo makes {len(checks)} checks, and made {len(record.checks)}")
    return guards


def _make_guards(record: GuardRecord, function: types.FunctionType, frame: Locals) -> tuple[Guards, list[str]]:
    """The guards, and the texts of their checks."""
    from torch._dynamo.guards import CheckFunctionManager
    from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState, get_builtins_dict
    from torch._guards import GuardsSet
    from torch.utils._ordered_set import OrderedSet

    scope = function.__globals__
    for name, module in record.imports.items():  # As Dynamo does when it traces.
        scope.setdefault(name, importlib.import_module(module))
    if record.builtins_name is not None:
        scope.setdefault(record.builtins_name, get_builtins_dict(scope))
    state = OutputGraphGuardsState(
        local_scope=frame,
        global_scope=scope,
        torch_function_mode_stack=[],
        guard_on_key_order={*record.key_order},
        input_source_to_sizes_strides=record.sizes,
        dual_level=-1,
        functorch_layers=[],
        current_device=record.device,
        global_state_guard=torch._C._dynamo.guards.GlobalStateGuard(),
        _guards=GuardsSet(OrderedSet(map(_bare, record.guards))),
        _aotautograd_guards=[],
        skip_guards_check=True,  # It is made below. Dynamo reports a failure as a bug of its own.
        name_of_builtins_dict_key_in_fglobals=record.builtins_name,
    )
    try:
        manager = CheckFunctionManager(function.__code__, OutputGraphCommon(state)).guard_manager
    except Exception as error:  # A guard on something that does not exist here.
        raise NotSavedError(f"a guard cannot be made ({type(error).__name__}: {error})") from error
    if not manager.check(frame):
        failed = manager.check_verbose(frame).verbose_code_parts
        raise NotSavedError(f"a guard does not hold: {cut(failed[0] if failed else 'unknown', 100)}")
    described = _Describer(frame, scope)
    checks = [*described.checks(manager.root)]
    called = frame.get("self")
    inner = called.modules() if isinstance(called, torch.nn.Module) else ()
    return Guards(manager, held=[*described.objects, *map(type, inner)]), checks


class _Describer:
    """Describes checks, such that those with equal texts accept the same values.

    Attributes:
        objects: The objects that are compared by identity. They must be kept alive, or others might get their numbers.
    """

    def __init__(self, frame: Locals, scope: dict[str, Any]) -> None:
        from torch._dynamo.guards import _get_closure_vars

        self._names = {**_get_closure_vars(), "L": frame, "G": scope}
        self.objects: list[Any] = []

    def checks(self, manager: Any) -> Iterator[str]:
        for leaf in manager.get_leaf_guards():
            yield from map(self._text, leaf.verbose_code_parts())
        for child in manager.get_child_managers():
            yield from self.checks(child)
        if hasattr(manager, "get_key_value_managers"):
            yield f"the keys of {manager.get_source()} are {[*map(repr, self._eval(manager.get_source()))]}"
            for pair in manager.get_key_value_managers().values():
                for child in filter(None, pair):
                    yield from self.checks(child)

    def _text(self, part: str) -> str:
        text = part.split("  # ")[0].strip()  # A comment names the user's line, with the path of the file.
        if by_type := _BY_TYPE.match(text):
            return by_type[1] + text[by_type.end() - 1 :]
        by_identity = _BY_IDENTITY.match(text)
        if by_identity is None:
            return _with_sorted_sets(text)
        found = self._eval(by_identity[1])
        if id(found) != int(by_identity[2]):
            raise NotSavedError(f"the object {by_identity[1]} is another one at every access")
        self.objects.append(found)
        return f"{by_identity[1]} is {_description(found, by_identity[1])}"

    def _eval(self, expression: str) -> Any:
        try:
            return eval(expression, self._names)
        except Exception as error:
            raise NotSavedError(f"{expression} cannot be evaluated ({type(error).__name__})") from error


def _difference(found: str, wanted: str) -> str:
    """Where the texts of two checks differ. The check of torch's global state contains it as JSON."""
    try:
        states = [json.loads(text[text.index("{") : text.rindex("}") + 1]) for text in (found, wanted)]
        now, then = ({str(name): value for name, value in state.items()} for state in states)
    except (ValueError, AttributeError):
        pairs = enumerate(zip(found, wanted, strict=False))
        first = next((i for i, (one, other) in pairs if one != other), 0)
        start = max(0, first - 30) if len(found) > 70 else 0
        return f"{cut(found[start:], 60)}; saved: {cut(wanted[start:], 60)}"
    names = [name for name in now if now[name] != then.get(name)]
    return ", ".join(f"{name}={shown(now[name])}; saved: {name}={shown(then.get(name))}" for name in names)


def _with_sorted_sets(text: str) -> str:
    """The order of a set of strings differs from process to process."""
    left, equals, right = text.rpartition(" == ")
    if not equals or not right.startswith(("{", "frozenset({")):
        return text
    try:
        value = ast.literal_eval(right.removeprefix("frozenset(").removesuffix(")") if "frozenset" in right else right)
    except (ValueError, SyntaxError):
        return text
    return f"{left} == {sorted(map(repr, value))}" if isinstance(value, set) else text


def _description(found: Any, expression: str) -> str:
    """What an object is in any process.

    Raises:
        NotSavedError: It is known by its identity only.
    """
    if isinstance(found, types.MethodType):
        found = found.__func__
    if isinstance(found, types.FunctionType):
        return f"the function {found.__module__}.{found.__qualname__} {_digest_code(found.__code__)}"
    if isinstance(found, types.CodeType):
        return f"the code {found.co_name} {_digest_code(found)}"
    if isinstance(found, types.ModuleType):
        return f"the module {found.__name__}"
    if isinstance(found, type):
        return f"the type {found.__module__}.{found.__qualname__}"
    if isinstance(found, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
        return f"the builtin {getattr(found, '__module__', None)}.{found.__qualname__}"
    if isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"the operator {found}"
    if found is None or isinstance(found, bool | int | float | str | enum.Enum | torch.dtype):
        return f"the value {found!r}"
    raise NotSavedError(f"Dynamo compares {expression}, a {type(found).__name__}, by its identity")


def _bare(guard: Any) -> Any:
    """The guard as it is before Dynamo makes checks from it: without references to the objects of a process."""
    create = guard.create_fn
    if isinstance(create, functools.partial) and create.func.__name__ == "TENSOR_MATCH":
        create = create.func  # The argument is a reference to the tensor, which is otherwise found by the source.
    return dataclasses.replace(
        guard, create_fn=create, obj_weakref=None, guarded_class_weakref=None, guard_types=None, code_list=None,
        stack=None, user_stack=None,
    )  # fmt: skip


def _skipped() -> tuple[str, ...]:
    is_off = getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False)
    return _NO_CHECKS if is_off else _NO_CHECKS[:1]


# The code that Dynamo traced


def _name_of(code: types.CodeType) -> tuple[str, str]:
    module = inspect.getmodule(code)
    if module is None:
        raise NotSavedError(f"the module of the function {code.co_name} is unknown")
    return module.__name__, getattr(code, "co_qualname", code.co_name)


def _describe_code(module: str, qualified: str) -> tuple[str, str, str, str]:
    """(module, qualified name, digest of the file, digest of the code that the name leads to)."""
    try:
        found: Any = importlib.import_module(module)
        file = hashlib.sha256(Path(found.__file__).read_bytes()).hexdigest()
    except (ImportError, AttributeError, TypeError, OSError) as error:
        raise NotSavedError(f"the source of the module {module} is not a file") from error
    try:
        for name in qualified.split("."):
            found = inspect.getattr_static(found, name)
    except AttributeError:  # A function in a function, which only the file shows.
        return module, qualified, file, ""
    return module, qualified, file, " ".join(map(_digest_code, _codes_behind(found)))


def _codes_behind(found: Any) -> Iterator[types.CodeType]:
    """The code of a function, of what it wraps, or of the functions of a property."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        inner = getattr(found, name, None)
        if inner is not None:
            yield from _codes_behind(inner)
    if isinstance(found, types.FunctionType):
        yield found.__code__


def _digest_code(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code)
    for const in code.co_consts:
        text = _digest_code(const) if isinstance(const, types.CodeType) else _stable(const)
        digest.update(text.encode())
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    return digest.hexdigest()[:32]


def _stable(const: Any) -> str:
    return repr(sorted(map(repr, const))) if isinstance(const, frozenset) else repr(const)


class _Traced(Exception):
    """Ends the call of a function once it was traced."""


def _stop(*_args: Any) -> Any:
    raise _Traced
