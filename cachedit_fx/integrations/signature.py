"""Describes what a configuration was tuned on, and compares it with a pipeline and its calls."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachedit_fx._version import __version__
from cachedit_fx.errors import cut
from cachedit_fx.integrations.block_adapter import transformers_of

log = logging.getLogger(__name__)

Signature = dict[str, Any]  # Contains only what JSON and YAML can store.


def signature_of(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    calls: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, tuple[int, ...]],
    num_steps: int,
) -> Signature:
    """Returns everything that the best schedule depends on.

    Args:
        pipe: The pipeline.
        modules: Its transformers that run, by name.
        calls: The arguments of each call. All numbers among them are included: sizes, guidance, the number of steps.
        inputs: Shapes of the tensors that a transformer was called with, by argument name.
        num_steps: The number of calls of the model per guidance branch.
    """
    return _static(pipe, modules) | {
        "num_steps": num_steps,
        "latents": _latents(inputs),
        "arguments": _numbers(calls),
        "versions": _versions(),
    }


def differences(pipe: Any, signature: Mapping[str, Any], call: Mapping[str, Any] | None = None) -> list[str]:
    """Returns how a pipeline and a call of it differ from a signature, one line each. Versions are not compared."""
    static = _static(pipe, transformers_of(pipe))
    found = [
        _line(name, signature[name], value) for name, value in static.items() if signature.get(name, value) != value
    ]
    tuned = signature.get("arguments") or {}
    for name, values in _numbers([call] if call else []).items():
        if name in tuned and not set(values) <= set(tuned[name]):
            found.append(_line(name, tuned[name], values))
    return found


def check_signature(pipe: Any, signature: Mapping[str, Any], call: Mapping[str, Any] | None = None) -> list[str]:
    """Logs a warning if the pipeline or the arguments of a call differ from a signature.

    Args:
        pipe: The pipeline that is used.
        signature: What the configuration was tuned on, as `load_tuned` returns it.
        call: The arguments of a call of the pipeline, if they are to be compared.

    Returns:
        The differences, one line each.
    """
    found = differences(pipe, signature, call)
    if found:
        log.warning(
            "cachedit_fx: this configuration was tuned on something else, so its quality is not known here.\n%s\n"
            "What to do: call cachedit_fx.tune for this pipeline and these arguments.",
            "\n".join(f"  {line}" for line in found[:8]),
        )
    return found


def _line(name: str, tuned: Any, found: Any) -> str:
    if isinstance(tuned, Mapping) and isinstance(found, Mapping):
        names = [key for key in {**tuned, **found} if tuned.get(key) != found.get(key)]
        tuned, found = ({key: of.get(key) for key in names[:4]} for of in (tuned, found))
    return f"{name}: tuned on {cut(tuned)}, found {cut(found)}"


def _static(pipe: Any, modules: Mapping[str, nn.Module]) -> Signature:
    """Returns the part of the signature that does not depend on calls."""
    scheduler = getattr(pipe, "scheduler", None)
    first, *others = modules.items()
    weight = next(first[1].parameters(), None)
    found = {
        "pipeline": type(pipe).__name__,
        "transformer": type(first[1]).__name__,
        "transformer_config": _hash(config_of_part(first[1])),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": config_of_part(scheduler),
        "dtype": str(weight.dtype).removeprefix("torch.") if weight is not None else "",
    }
    for name, module in others:
        found[f"{name}_config"] = _hash(config_of_part(module))
    if others:  # Such as the boundary between the timesteps of the transformers of Wan 2.2.
        found["pipeline_config"] = {n: v for n, v in config_of_part(pipe).items() if isinstance(v, int | float)}
    return found


def config_of_part(part: Any) -> dict[str, Any]:
    """Returns the configuration of a component of diffusers, without private entries such as files and versions."""
    config = getattr(part, "config", None)
    found = dict(config) if isinstance(config, Mapping) else {}
    # Converted through JSON, which turns tuples into lists, so that it equals what is read from a file.
    plain = json.loads(json.dumps({key: value for key, value in found.items() if key[:1] != "_"}, default=str))
    return dict(sorted(plain.items()))


def _hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _latents(inputs: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Returns the shape of the first tensor that the model is called with, without the batch dimension."""
    return [*next(iter(inputs.values()), ())[1:]]


def _numbers(calls: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns all arguments that are numbers, with the values that they have in the calls."""
    found: dict[str, list[Any]] = {}
    for call in calls:
        for name, value in call.items():
            if isinstance(value, int | float) and value not in found.setdefault(name, []):
                found[name].append(value)
    return dict(sorted(found.items()))


def _versions() -> dict[str, str]:
    found = {"cachedit_fx": __version__, "torch": str(torch.__version__)}
    try:
        import diffusers

        found["diffusers"] = diffusers.__version__
    except ImportError:
        pass
    return found
