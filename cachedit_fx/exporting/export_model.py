"""Exports a transformer with its cache: `export`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachedit_fx.config.cache_config import CacheConfig, check_together
from cachedit_fx.errors import ConfigError, NoMatchError, cut, shown
from cachedit_fx.exporting.cached_module import CachedModule
from cachedit_fx.exporting.exported_model import ExportedModel, value_at
from cachedit_fx.exporting.refuse_config import check_exportable
from cachedit_fx.exporting.state_layout import layout_of
from cachedit_fx.exporting.tensor_spec import TensorSpec
from cachedit_fx.frontend.backend import refusal
from cachedit_fx.frontend.capture import GraphInput, copy_graph
from cachedit_fx.frontend.entry_points import has_tensor
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.frontend.torch_internals import BackendCompilerFailed, TorchDynamoException, patched_config
from cachedit_fx.frontend.uncached import cure_of_parts
from cachedit_fx.inspect.explanation.dynamo_recorder import forgotten_sizes, isolated
from cachedit_fx.integrations.block_adapter import BlockAdapter
from cachedit_fx.integrations.pipelines import enabled_settings, settings_for
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.patterns.mismatch import Mismatch


def export(
    model: Any, inputs: Sequence[Any] | Mapping[str, Any], cache_config: CacheConfig | None = None
) -> ExportedModel:
    """Exports a transformer with its cache, as a program that runs without this package and without Python.

    The graph is captured and rewritten as by `enable_cache`; nothing is compiled, and the model is not changed. The
    cached values, the counters and the threshold are inputs of the program, and the new state is an output
    (docs/export.md). The program has the sizes of `inputs`. Everything in `inputs` that is not a tensor is a constant.

    Args:
        model: The transformer, or a `BlockAdapter` of one transformer.
        inputs: The positional arguments of a call, or a mapping of its keyword arguments.
        cache_config: The configuration, by default `CacheConfig()`.

    Returns:
        The exported model. `torch._inductor.aoti_compile_and_package(exported.program)` compiles it.

    Raises:
        ConfigError: A field cannot be part of an exported graph, or `inputs` does not fit the model.
        NoMatchError: The graph cannot be cached, or cannot be exported with its cache.
        PatternError: The model contradicts what was declared about it.
    """
    module, settings = _transformer(model, cache_config)
    check_together(settings.config)
    check_exportable(settings.config)
    arguments = _by_keyword(module, inputs)
    if settings.functor is not None:
        settings.functor.prepare(module)
    try:
        captured = _capture(module, settings, arguments)
    finally:
        if settings.functor is not None:
            settings.functor.restore(module)
    return _export(type(module).__name__, captured, settings.config, arguments)


def _transformer(model: Any, cache_config: CacheConfig | None) -> tuple[nn.Module, Settings]:
    """The transformer, and its settings. Without a configuration, those with which its cache is enabled."""
    plain = getattr(model, "_orig_mod", model)
    found = settings_for(plain, cache_config)
    if not isinstance(plain, nn.Module | BlockAdapter) or len(found) != 1:
        raise ConfigError(
            f"cachedit_fx: model must be a transformer or a BlockAdapter of one, got {type(plain).__name__} with "
            f"{', '.join(found)}; export every transformer by itself"
        )
    ((module, settings),) = found.values()
    enabled = enabled_settings(module)
    if enabled is None:
        return module, settings
    return module, replace(enabled, functor=None, config=settings.config if cache_config else enabled.config)


def _by_keyword(module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        ConfigError: They do not fit the signature of the model.
    """
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*inputs)
    except TypeError as error:
        raise ConfigError(
            f"cachedit_fx: inputs must be the arguments of a call of {type(module).__name__}, as a tuple or as a "
            f"mapping by name.\n  found: {shown(inputs)}: {error}"
        ) from error
    bound.apply_defaults()
    found = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL and not found[parameter.name]:
            del found[parameter.name]
    return found


@dataclass(frozen=True)
class _Captured:
    """The cached graph of a model, and for each of its arguments the label and the example."""

    rewritten: Rewritten
    inputs: list[tuple[GraphInput, Any]]


class _Stop(Exception):
    """Raised in place of running the captured graph."""


def _capture(module: nn.Module, settings: Settings, arguments: Mapping[str, Any]) -> _Captured:
    """Captures the model as one graph, and rewrites it. The model does not run.

    Raises:
        NoMatchError: Dynamo does not capture it as one graph, or the graph cannot be cached.
    """
    name = type(module).__name__
    captured: list[_Captured | Mismatch] = []
    config = settings.config.override(compile_blocks="inline")

    def record(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        copied = copy_graph(gm, examples)
        labels = [node.meta["cachedit_input"] for node in copied.graph.find_nodes(op="placeholder")]
        found = refusal() or rewrite(copied, config, settings.declared, exact=False)
        if isinstance(found, Rewritten):
            captured.append(_Captured(found, [*zip(labels, examples, strict=True)]))
        else:
            captured.append(found[0])
        return _stop

    # Sizes that depend on data are unknown before a step, and cannot be those of a state.
    without_data = {"capture_scalar_outputs": False, "capture_dynamic_output_shape_ops": False}
    with forgotten_sizes(), patched_config(without_data), torch.no_grad():
        try:
            torch.compile(module._call_impl, backend=record, fullgraph=True, dynamic=False, **isolated())(**arguments)
        except _Stop:
            pass
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        except TorchDynamoException as error:
            found = f"Dynamo breaks it up ({cut(str(error).strip().splitlines()[0], 120)})"
            raise _refused(name, "a model that Dynamo captures as one graph", found, cure_of_parts(name)) from error
    (result,) = captured
    if isinstance(result, Mismatch):
        raise _mismatch_error(name, result)
    return result


def _stop(*_: Any) -> Any:
    raise _Stop


def _export(name: str, captured: _Captured, config: CacheConfig, arguments: Mapping[str, Any]) -> ExportedModel:
    rewritten = captured.rewritten
    _check_graph(name, rewritten, config)
    layout = layout_of(rewritten.plan, rewritten.runtime_plan, config)
    names = [*arguments]
    passed = [label.path for label, example in captured.inputs if _is_passed(label, example)]
    examples = {label.path: example for label, example in captured.inputs if _is_passed(label, example)}
    for path, example in examples.items():
        if value_at(arguments, path) is not example:
            found = f"a tensor ({path}) that is made from the arguments outside of the graph"
            raise _refused(name, "a graph whose inputs are tensors of the call", found, "pass it as a tensor")
    ordered = sorted(examples, key=lambda path: (names.index(path.partition(".")[0]), path))
    held = [None if _is_passed(label, example) else (label.path, example) for label, example in captured.inputs]
    module = CachedModule(rewritten.gm, layout, held, [ordered.index(path) for path in passed])
    state, inputs = layout.specs(), tuple(TensorSpec.of(path, examples[path]) for path in ordered)
    with torch.inference_mode(False), torch.no_grad():
        threshold = torch.tensor(config.residual_diff_threshold, dtype=torch.float64, device=layout.device)
        given = tuple(examples[path].detach().clone() for path in ordered)
        program = torch.export.export(module, (given, tuple(s.zeros() for s in state), threshold), strict=False)
    return ExportedModel(
        program,
        inputs,
        state,
        config.residual_diff_threshold,
        tuple(region.plan.name for region in layout.regions),
        {name: value for name, value in arguments.items() if not has_tensor(value)},
        tuple(names),
    )


def _is_passed(label: GraphInput, example: Any) -> bool:
    """Whether the caller passes the argument, rather than the model holding it."""
    return isinstance(example, Tensor) and not label.is_weight


def _check_graph(name: str, rewritten: Rewritten, config: CacheConfig) -> None:
    """Checks that the graph can be exported with its cache.

    Raises:
        NoMatchError: It cannot.
    """
    effect = rewritten.runtime_plan.effect
    if effect:
        found = f"a forward that {effect}"
        raise _refused(name, "a graph that only computes its outputs", found, "remove this from the forward")
    regions = rewritten.runtime_plan.regions
    thresholds = {config.override(region.overrides).residual_diff_threshold for region in regions}
    if thresholds != {config.residual_diff_threshold}:
        found = f"regions with the thresholds {sorted(thresholds)}"
        cure = "set residual_diff_threshold for the whole model"
        raise _refused(name, "one threshold, which is an input", found, cure)
    for region in regions:
        check_exportable(config.override(region.overrides))


def _refused(name: str, expected: str, found: str, cure: str) -> NoMatchError:
    return NoMatchError(
        f"cachedit_fx: {name} was not exported.\n  expected: {expected}\n  found:    {found}\nWhat to do: {cure}."
    )


def _mismatch_error(name: str, nearest: Mismatch) -> NoMatchError:
    lines = "\n".join((f"{nearest.cause.value}:", *nearest.lines))
    return NoMatchError(
        f"cachedit_fx: {name} was not exported, because it cannot be cached.\n{lines}\nWhat to do: {nearest.cure}.\n"
        "See every verdict: cachedit_fx.explain(model, *inputs)"
    )
