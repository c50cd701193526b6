"""The rows of `messages_table` for exports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cachedit_fx
from cachedit_fx import BlockAdapter, ParamsModifier
from cachedit_fx.exporting import ExportedModel, TensorSpec
from tests import tiny
from tests.hybrid import pipe_of
from tests.messages_table import Row


def arguments(**others: Any) -> dict[str, Any]:
    times = torch.ones(tiny.BATCH)
    return dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=times) | others


def export(model: Any, inputs: Any = None, **fields: Any) -> None:
    with torch.no_grad():
        cachedit_fx.export(model, inputs or arguments(), tiny.config(**fields))


class Noisy(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return super().forward(hidden_states + torch.randn_like(hidden_states), encoder_hidden_states, timestep)


class FromArray(tiny.Transformer):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any, timestep: Tensor) -> tuple[Tensor, ...]:
        return super().forward(hidden_states, torch.from_numpy(encoder_hidden_states), timestep)


def of_two_thresholds() -> BlockAdapter:
    model = tiny.frozen(tiny.TwoLists())
    modifiers = [ParamsModifier(cachedit_fx.CacheConfig(residual_diff_threshold=t)) for t in (0.1, 0.2)]
    return BlockAdapter(transformer=model, params_modifiers=modifiers)


def with_other_sizes() -> None:
    spec = TensorSpec("hidden_states", (1, 4), torch.float32, torch.device("cpu"))
    ExportedModel(None, (spec,), (), 0.1, ()).arguments(hidden_states=torch.zeros(2, 4))


ROWS = [
    Row(
        "export-field",
        lambda _: export(tiny.build(), shadow=True),
        "got True",
        "shadow must be False in an exported graph",
    ),
    Row(
        "export-pipeline",
        lambda _: export(pipe_of(transformer=tiny.build())),
        "got SimpleNamespace with transformer",
        "model must be a transformer or a BlockAdapter of one",
    ),
    Row(
        "export-inputs",
        lambda _: export(tiny.build(), dict(latents=tiny.latents())),
        "found: {'latents': tensor(",
        "inputs must be the arguments of a call of Transformer",
    ),
    Row(
        "export-constant",
        lambda _: ExportedModel(None, (), (), 0.1, (), {"timestep": 1.0}).arguments(timestep=0.9),
        "got 0.9",
        "timestep must be 1.0, which is a constant of the program",
    ),
    Row(
        "export-sizes",
        lambda _: with_other_sizes(),
        "got a float32 tensor of shape (2, 4) on cpu",
        "hidden_states must be a float32 tensor of shape (1, 4) on cpu",
    ),
    Row(
        "export-graph-break",
        lambda _: export(tiny.frozen(tiny.TwoLists(broken=True))),
        "found:    Dynamo breaks it up (",
        "expected: a model that Dynamo captures as one graph",
    ),
    Row(
        "export-effect",
        lambda _: export(tiny.frozen(Noisy())),
        "draws random numbers",
        "expected: a graph that only computes its outputs",
    ),
    Row(
        "export-array",
        lambda _: export(tiny.frozen(FromArray()), arguments(encoder_hidden_states=tiny.prompt().numpy())),
        "encoder_hidden_states) that is made from the arguments",
        "expected: a graph whose inputs are tensors of the call",
    ),
    Row(
        "export-thresholds",
        lambda _: export(of_two_thresholds()),
        "[0.1, 0.2]",
        "expected: one threshold, which is an input",
    ),
]
