"""The result of `export`: a program with a documented state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.exporting.tensor_spec import TensorSpec

METADATA_KEY = "cachedit_fx"


class ExportedStep(NamedTuple):
    """What one step of an exported model returns.

    Attributes:
        outputs: The outputs of the model, in the order in which its graph returns them.
        state: The state to pass to the next step.
        computed: Whether each region ran its blocks, bool [R]. False where it was reused.
        residual_diff: The residual diff of each region, float64 [R]; NaN where none is measured.
    """

    outputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...]
    computed: Tensor
    residual_diff: Tensor


@dataclass(frozen=True)
class ExportedModel:
    """A transformer with its cache, as a program that runs without this package.

    The program takes `(inputs, state, threshold)` and returns what `ExportedStep` lists, as plain tuples. The caller
    owns the state: one for every generation and guidance branch, and for every further call of a step.

    Attributes:
        program: The exported program.
        inputs: The tensors that the model takes, in the order of the program. The name is that of the argument; for a
            tensor inside of an argument it is the path, as in `joint_attention_kwargs.scale`.
        state: The tensors of the state, in the order of the program (docs/export.md).
        residual_diff_threshold: The threshold of the configuration.
        regions: What a reused step skips, for example `transformer_blocks[1:]`.
        constants: The arguments without tensors, which are constants of the program.
    """

    program: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    residual_diff_threshold: float
    regions: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict, repr=False)
    parameters: tuple[str, ...] = field(default=(), repr=False)  # Of the model's forward, for positional arguments.

    def initial_state(self) -> tuple[Tensor, ...]:
        """The state before the first step of a generation: zeros."""
        return tuple(spec.zeros() for spec in self.state)

    def threshold(self, value: float | None = None) -> Tensor:
        """A threshold as the program takes it, float64 []; by default that of the configuration."""
        value = self.residual_diff_threshold if value is None else value
        return torch.tensor(value, dtype=torch.float64, device=self.state[0].device)

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The inputs of the program, taken from the arguments of a call of the model.

        Raises:
            ConfigError: An input is missing, or an argument differs from the exported one in more than the values of a
                tensor.
        """
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        for name, constant in self.constants.items():
            if name in given and not _are_equal(given[name], constant):
                raise ConfigError(
                    f"cachedit_fx: {name} must be {shown(constant)}, which is a constant of the program, got "
                    f"{shown(given[name])}; pass it as a tensor, or export the model again"
                )
        found = []
        for spec in self.inputs:
            value = value_at(given, spec.name)
            if not isinstance(value, Tensor) or TensorSpec.of(spec.name, value) != spec:
                raise ConfigError(
                    f"cachedit_fx: {spec.name} must be a {spec.mapping['dtype']} tensor of shape {spec.shape} on "
                    f"{spec.device}, got {_described(value)}; export the model again for other sizes"
                )
            found.append(value)
        return tuple(found)

    @cached_property
    def _module(self) -> torch.nn.Module:
        return self.program.module()

    def __call__(
        self, inputs: Sequence[Tensor], state: Sequence[Tensor], threshold: Tensor | None = None
    ) -> ExportedStep:
        """Runs one step with eager operations.

        Args:
            inputs: What `arguments` returns.
            state: What `initial_state` or the step before returned.
            threshold: What `threshold` returns; by default, the threshold of the configuration.
        """
        with torch.no_grad():
            found = self._module(tuple(inputs), tuple(state), self.threshold() if threshold is None else threshold)
        return ExportedStep(*found)

    @property
    def metadata(self) -> dict[str, str]:
        """The description of the program for Inductor's option `aot_inductor.metadata`: JSON, under one key.

        It has the keys "inputs", "state", "threshold" and "regions".
        """
        description = {
            "inputs": [spec.mapping for spec in self.inputs],
            "state": [spec.mapping for spec in self.state],
            "threshold": self.residual_diff_threshold,
            "regions": [*self.regions],
        }
        return {METADATA_KEY: json.dumps(description)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program by `torch.export.save`, with the description as the extra file `cachedit_fx`."""
        torch.export.save(self.program, os.fspath(path), extra_files=self.metadata)


def value_at(arguments: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `joint_attention_kwargs.scale` or `latents.0`; None if there is none."""
    value: Any = arguments
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = getattr(value, part, None)
    return value


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # Arrays and tensors are compared element by element.
        return False


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
