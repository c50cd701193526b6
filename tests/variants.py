"""Synthetic transformers that differ only in their loop, and functions that run the passes on a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cachedit_fx.passes.plan import Plan
from cachedit_fx.patterns import Mismatch
from tests.synthetic import Transformer, plan


def planned(model: nn.Module, inputs: dict[str, Any] | None = None, **fields: Any) -> Plan:
    found = plan(model.eval(), inputs, **fields)
    assert isinstance(found, Plan), [str(mismatch) for mismatch in found]
    return found


def refused(model: nn.Module, **fields: Any) -> Mismatch:
    found = plan(model.eval(), **fields)
    assert isinstance(found, tuple), str(found)
    return found[0]


class Variant(Transformer):
    """A transformer whose subclasses override `loop`."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        temb = self.embed_time(timestep)
        hidden_states = self.x_embedder(hidden_states)
        hidden_states = self.loop(hidden_states, temb)
        return self.unembed(hidden_states, temb)
