"""The private names of Dynamo and Inductor that this package uses. Only `guard_records.py` uses others.

`TESTED_VERSIONS` lists the versions of torch that the tests ran on. In addition, every name in this file was looked up
in the sources of torch 2.11.0, 2.12.1, 2.13.0 and 2.14.1. All four versions have it unless its comment says otherwise.
Older versions are not supported. The consequences of a missing name:

| names | without them |
|---|---|
| those in the `try` at the top of this file | `import cachedit_fx` raises an ImportError that names the missing name |
| `f_locals`, `f_code` of a trace | the first compilation raises the same error |
| the section "Guards", other names of "The trace" | Dynamo makes every call; one warning per process states the costs |
| `dict_version` | the contents of dictionaries are compared at every call, which is slower |
| `guard_on_dict_versions` | versions of dictionaries are read one by one, which is slower |
| other names | stated where they are used |

Exceptions: `config`, which must not import this file, lists the options and modes of Inductor with documented
functions. Fake tensors, symbolic shapes, `torch.fx` and its tracers (`forecasters/trace_function.py`) are not part of
Dynamo or Inductor; the modules that need them import them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

TESTED_VERSIONS = ("2.13.",)
SUPPORTED_VERSIONS = "2.11 to 2.14"


def is_tested_version() -> bool:
    """Whether the tests ran on this version of torch."""
    return str(torch.__version__).startswith(TESTED_VERSIONS)


def tested_versions() -> str:
    """`2.13.x`: `TESTED_VERSIONS` as a message shows them."""
    return ", ".join(f"{version}x" for version in TESTED_VERSIONS)


def _missing(error: Exception) -> str:
    """The message for a private name that this version of torch lacks. `error` is Python's, which states the name."""
    return (
        "cachedit_fx: this version of torch lacks a private name that cachedit_fx uses.\n"
        f"  expected: torch {SUPPORTED_VERSIONS}; the tests run on {tested_versions()}\n"
        f"  found:    torch {torch.__version__}: {str(error).partition(' (')[0]}\n"
        f'What to do: install a supported version, for example by pip install "torch=={TESTED_VERSIONS[0]}*".'
    )


try:
    from torch._dynamo import config as _config
    from torch._dynamo import eval_frame as _eval_frame
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.eval_frame import OptimizedModule
    from torch._dynamo.exc import (
        BackendCompilerFailed,
        FailOnRecompileLimitHit,
        RestartAnalysis,
        TorchDynamoException,
    )
    from torch._dynamo.mutation_guard import GenerationTracker
    from torch._dynamo.pgo import get_code_state
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import counters, numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
    from torch._inductor import config as inductor_config
    from torch._logging._internal import trace_structured_artifact
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils import _pytree as pytree

    # Read here so that a version that lacks one is reported at the import, not at a later call.
    _ = (InstructionTranslator.current_tx, torch._TorchCompileInductorWrapper, _config.patch, _config.recompile_limit)
except (ImportError, AttributeError) as error:
    raise ImportError(_missing(error)) from error

__all__ = [
    "BackendCompilerFailed",  # An exception in a backend; `inner_exception` is that exception.
    "FailOnRecompileLimitHit",  # Raised at the recompile limit with `fullgraph=True`. Not a TorchDynamoException.
    "OptimizedModule",  # What `torch.compile(module)` returns; `_orig_mod` is the module.
    "RestartAnalysis",  # A backend must let it pass: Dynamo captures the graph again, with a number specialized.
    "TorchDynamoException",  # The base class of Dynamo's errors.
    "compile_lock",  # An RLock that Dynamo holds while it compiles. Inductor compiles one graph at a time.
    "get_code_state",  # The sizes that Dynamo has observed, by code object; `explain` restores them.
    "numpy_method_wrapper",  # The three callables by which Dynamo's graphs call NumPy functions.
    "numpy_operator_wrapper",
    "numpy_to_tensor_wrapper",
    "trace_structured_artifact",  # Writes to torch's structured trace (TORCH_TRACE, read by tlparse).
]

Locals = dict[str, Any]  # The local variables of a frame.


# Guards


class Guards:
    """Dynamo's guards on one compiled graph.

    Uses `GuardManagerWrapper` (`root`, `extra_state`) and `RootGuardManager.clone_manager`.

    Args:
        held: For a graph that Dynamo does not hold, the objects whose identity is checked; they are kept alive.

    Attributes:
        check: Whether all guards hold, given the locals of a frame.
    """

    __slots__ = ("_held", "_manager", "check")

    def __init__(self, manager: Any, held: Sequence[Any] = ()) -> None:
        self._manager, self._held = manager, held
        self.check: Callable[[Locals], bool] = manager.check

    def is_live(self) -> bool:
        """Whether Dynamo still holds the graph. It drops a graph whose guarded objects are deleted, and all at a reset.

        Raises:
            AttributeError: This version of torch does not record it.
        """
        return bool(self._held) or self._manager.extra_state is not None

    def check_of(self, is_kept: Callable[[str], bool]) -> Callable[[Locals], bool]:
        """The check of some of the guards only.

        Args:
            is_kept: Given the source expression of a guarded object, whether its guards are checked.
        """
        check: Callable[[Locals], bool] = self._manager.root.clone_manager(
            lambda manager: is_kept(manager.get_source())
        ).check
        return check


def find_guards(function: types.FunctionType, compiled: Callable[..., Any], frame: Locals) -> Guards | None:
    """The guards under which Dynamo calls `compiled` for `frame`; None if there are none that hold.

    A function can have graphs of several backends (of an earlier configuration, for instance) whose guards hold too.
    A graph is found only if it is the whole function: its code calls `compiled` and no other compiled function.

    Uses `_debug_get_cache_entry_list`, `innermost_fn`, and the prefixes of the names that Dynamo's code calls.
    """
    globals_, innermost = function.__globals__, _eval_frame.innermost_fn
    for entry in _eval_frame._debug_get_cache_entry_list(function.__code__):
        names = [name for name in entry.code.co_names if name.startswith(("__compiled_fn", "__resume_at"))]
        called = [innermost(globals_[name]) for name in names if name in globals_]
        if called == [compiled] and entry.guard_manager.check(frame):
            return Guards(entry.guard_manager)
    return None


def runs_compiled_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its forward and nothing else, and compiled code may run.

    Uses `eval_frame._stance` (see `torch.compiler.set_stance`), and the private attributes of `nn.Module` that hold
    hooks.
    """
    return _eval_frame._stance.stance == "default" and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._get_tracing_state()
    )


# The version of a dictionary: a number that CPython changes at every write. `torch._C._dynamo.guards.dict_version`
# exists since torch 2.0. None on a version that lacks it.
dict_version: Callable[[dict[Any, Any]], int] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "dict_version", None
)


def guard_on_dict_versions(dicts: list[dict[Any, Any]]) -> Callable[[list[dict[Any, Any]]], bool] | None:
    """A check, in one call of compiled code, that none of `dicts` has been written to since; None without the names.

    Uses `RootGuardManager`, `list_getitem_manager` and `add_dict_version_guard`. To make it takes about 7
    microseconds per dictionary; to check it is four times faster than to read the versions one by one.
    """
    try:
        from torch._dynamo.guards import GuardManagerType

        root = torch._C._dynamo.guards.RootGuardManager()
        for i, one in enumerate(dicts):
            manager = root.list_getitem_manager(i, "", one, GuardManagerType.GUARD_MANAGER)
            manager.add_dict_version_guard(one, [""], None)
    except (ImportError, AttributeError, TypeError):  # A name is missing, or takes other arguments.
        return None
    check: Callable[[list[dict[Any, Any]]], bool] = root.check
    return check


# The trace


def _translator() -> Any:
    """Dynamo's state of the trace that this thread is in; None outside of one.

    Uses `InstructionTranslator.current_tx`.
    """
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # Raised outside of a trace.
        return None


def _read(translator: Any, name: str) -> Any:
    """An attribute of Dynamo's state.

    Raises:
        ImportError: This version of torch lacks it. As at the import, the message states the name and the versions.
    """
    try:
        return getattr(translator, name)
    except AttributeError as error:
        raise ImportError(_missing(error)) from error


def is_traced_by_dynamo() -> bool:
    """Whether this thread is in a trace of Dynamo."""
    return _translator() is not None


def traced_locals() -> Locals:
    """The locals, at the call, of the function that Dynamo is tracing; empty outside of a trace.

    Uses `InstructionTranslator.f_locals`.
    """
    translator = _translator()
    return dict(_read(translator, "f_locals")) if translator is not None else {}


def is_resumed() -> bool:
    """Whether Dynamo is tracing the part of a function that follows a graph break.

    Uses the prefix of the names that Dynamo gives to such code (`TORCH_DYNAMO_RESUME_IN_PREFIX`). With another prefix,
    such code is taken for a whole forward, and the bare backend may warn about it separately.
    """
    translator = _translator()
    if translator is None:
        return False
    return str(_read(translator, "f_code").co_name).startswith("torch_dynamo_resume_in")


def own_kwargs(code: Any) -> str | None:
    """The source of the `**kwargs` of a traced function, a new dictionary at every call; None if there is none."""
    num_before = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return f"L['{code.co_varnames[num_before]}']" if code.co_flags & inspect.CO_VARKEYWORDS else None


def effect_of_call() -> str:
    """What Dynamo does at a call besides running the graph that it is tracing; empty if nothing.

    Uses the attributes `side_effects`, `root_tx` and `random_calls` of `OutputGraph`, and those of `SideEffects`.

    Raises:
        ImportError, AttributeError: This version of torch lacks one of them.
    """
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    output = _translator().output
    effects = output.side_effects
    # Changes to an object that the call itself creates have no effect outside.
    for variable in effects.id_to_variable.values():
        is_new = isinstance(variable.mutation_type, AttributeMutationNew | ValueMutationNew)
        if is_new or not effects.is_modified(variable):
            continue
        source = variable.source.name if variable.source is not None else "an object"
        if source != own_kwargs(output.root_tx.f_code):
            return f"the forward changes {source}"
    if effects.tensor_hooks or effects.save_for_backward:
        return "the forward prepares a backward pass"
    return "the forward draws random numbers in Python" if output.random_calls else ""


def input_expression(placeholder: fx.Node) -> str:
    """The expression by which Dynamo finds a graph input, over the locals `L` and globals `G`; empty if there is none.

    Uses `GraphArg.source`, which Dynamo puts into `meta["grapharg"]`.
    """
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return str(source.name) if source is not None else ""


def is_passed_as_found(placeholder: fx.Node) -> bool:
    """Whether Dynamo passes the object that `input_expression` finds; otherwise it makes the input at every call.

    Uses `GraphArg.pass_arg_as_tensor`.

    Raises:
        AttributeError: This version of torch lacks it.
    """
    graph_arg = placeholder.meta.get("grapharg")
    return graph_arg is not None and graph_arg.source is not None and not graph_arg.pass_arg_as_tensor


def is_held_by_module(placeholder: fx.Node) -> bool:
    """Whether Dynamo found a graph input in a module. Uses `Source.guard_source`."""
    held_in: Any = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), "guard_source", None)
    return held_in is not None and (held_in.is_unspecialized_nn_module() or held_in.is_specialized_nn_module())


# Configuration and limits

# The RuntimeError of a module that is compiled with `fullgraph=True`, if calls of other modules of its class brought
# the code past the recompile limit. Since torch 2.13; before, such a call runs without the cache and is reported so.
NOT_ATTEMPTED = "Compilation was not attempted"

# The message of a `RuntimeError` that `fullgraph=True` raises after a call in which Dynamo captured nothing at all, for
# example because the forward is marked by `torch.compiler.disable`.
NO_FRAMES = "found no compiled frames"

# The RuntimeError of a call that is made while `torch.fx` traces. One flag serves all threads, so it is also raised
# while another thread compiles a piece or a forecaster. Without it the error reaches the caller.
TRACED_BY_FX = "you are using FX to symbolically trace a dynamo-optimized function"

_LIMIT_REACHED = "Dynamo recompile limit exceeded"  # The beginning of a key of `counters["unimplemented"]`.


def recompile_limit() -> int:
    """How many graphs Dynamo compiles of one function: `torch._dynamo.config.recompile_limit`."""
    return int(_config.recompile_limit)


def patched_config(changes: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Sets fields of `torch._dynamo.config` in this thread, until the end of the block.

    Raises:
        AttributeError: This version of torch lacks a field. All four versions have those that this package sets.
    """
    patch: AbstractContextManager[None] = _config.patch(**changes)
    return patch


LOGS = "logging.Logger method not supported"  # The beginning of Dynamo's error for a log call in a forward.


def without_log_calls() -> dict[str, Any]:
    """The setting with which Dynamo leaves out the calls of loggers, such as `logger.warning`.

    Uses `ignore_logging_functions`, which was called `ignore_logger_methods` before. A method that returns a value,
    such as `isEnabledFor`, is not left out. Libraries add methods of their own to `Logger` (`warning_once`).
    """
    name = "ignore_logging_functions" if hasattr(_config, "ignore_logging_functions") else "ignore_logger_methods"
    levels = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")
    methods = {value for key, value in vars(logging.Logger).items() if key.startswith(levels) and callable(value)}
    return {name: {*getattr(_config, name), *methods}}


def num_limits_reached() -> int:
    """How often Dynamo found a function at its recompile limit in this process.

    Uses `counters["unimplemented"]`. If the text is another, a call that needs one graph too many is counted as
    uncached, without the limit as the reason.
    """
    return sum(count for text, count in counters["unimplemented"].items() if text.startswith(_LIMIT_REACHED))


def is_traced_here(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this thread traces the call, by `torch.fx.symbolic_trace` or `make_fx`."""
    return get_proxy_mode() is not None or any(isinstance(x, fx.Proxy) for x in pytree.tree_leaves((args, kwargs)))


# Inner backends and CUDA graphs


def dynamo_settings() -> dict[str, Any]:
    """The settings of Dynamo that can keep a model from being cached. Uses `config.disable`, `recompile_limit`."""
    return {"disable": _config.disable, "recompile_limit": _config.recompile_limit}


def inductor(mode: str | None, options: Mapping[str, Any]) -> tuple[Callable[..., Any], bool]:
    """Inductor with a mode and options, as `torch.compile` calls it; and whether it uses CUDA graphs.

    Uses `torch._TorchCompileInductorWrapper` and `torch._inductor.config.triton.cudagraphs`, the value that applies if
    neither the mode nor the options set it.
    """
    wrapper = torch._TorchCompileInductorWrapper(mode, dict(options), None)  # type: ignore[no-untyped-call]
    return wrapper, bool(wrapper.config.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def inductor_cache_folder() -> Path:
    """The folder of Inductor's cache on disk. Uses `cache_dir`."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def compiling(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """The context in which Inductor compiles a graph for fake tensors outside of a trace of Dynamo.

    Inductor uses its cache on disk only in a `TracingContext` with symbolic shapes. Uses `TracingContext`, `tracing`
    and `detect_fake_mode` of `torch._guards`.
    """
    from torch._guards import TracingContext, detect_fake_mode, tracing

    mode = detect_fake_mode(inputs) if TracingContext.try_get() is None else None
    return tracing(TracingContext(mode)) if mode is not None else contextlib.nullcontext()


def begin_cudagraph_generation() -> None:
    """Begins what CUDA graphs take for a new call of the model, as Dynamo does at every call that it serves.

    The buffers of an earlier generation may be written over. Uses `GenerationTracker.generation`.
    """
    GenerationTracker.generation += 1


def mark_static_inputs(piece: fx.GraphModule) -> None:
    """Shows AOTAutograd which inputs of a piece are weights, whose addresses stay the same from call to call.

    CUDA graphs copy all other inputs at every call. A piece is not a graph of Dynamo, so it gets the attributes by
    which AOTAutograd recognizes one: `meta["dynamo_compile_id"]`, `_param_name_to_source`, and `_dynamo_source` of the
    placeholders. Dynamo's mark on a weight, `_dynamo_static_input_type`, is in the `tensor_dict` of its placeholder.
    Without these names, no input is static.
    """
    piece.meta.setdefault("dynamo_compile_id", None)
    piece._param_name_to_source = {}  # type: ignore[assignment]
    for node in piece.graph.nodes:
        if node.op == "placeholder":
            node._dynamo_source = getattr(node.meta.get("grapharg"), "source", None)


def named_backend(name: str, mode: str | None) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """A registered backend of `torch.compile`, with a mode if one is given. Uses `lookup_backend`."""
    backend: Callable[..., Any] = lookup_backend(name)
    kwargs = {"mode": mode} if mode and mode != "default" else {}
    return lambda gm, inputs: backend(gm, inputs, **kwargs)
