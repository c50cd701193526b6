"""Work before a region that only the blocks of the region read is moved into the region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Region
from tests import synthetic


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class TwoStreams(nn.Module):
    """Blocks with two streams; with `writes` the loop writes into a buffer before the region."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(synthetic.DualBlock() for _ in range(4))
        self.embed = nn.Linear(1, synthetic.WIDTH)
        self.writes = writes

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        temb = self.embed(timestep[:, None])
        for i, block in enumerate(self.blocks):
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb)
            if self.writes and i == 0:
                buffer = torch.zeros(3)
                buffer[:1] = 1
                temb = temb + buffer.sum()
        return (hidden_states,)


def two_streams_call() -> dict[str, Tensor]:
    sizes = {"hidden_states": synthetic.IMAGE, "encoder_hidden_states": synthetic.TEXT}
    streams = {name: torch.randn(2, tokens, synthetic.WIDTH) for name, tokens in sizes.items()}
    return streams | {"timestep": torch.full((2,), 0.5)}


def deferred_of(model: nn.Module, call: dict[str, Tensor], **fields: Any) -> Region:
    found = synthetic.plan(model.eval(), call, **{"Fn_compute_blocks": 1} | fields)
    assert isinstance(found, Plan)
    return found.regions[0]


def test_work_that_only_the_region_reads_is_deferred_into_it():
    region = deferred_of(TwoStreams(), two_streams_call())
    names = {node.meta["nn_module_stack"].popitem()[1][0] for node in region.deferred if "nn_module_stack" in node.meta}
    assert any("mlp_context" in name for name in names)  # The text after the first block, which no Bn block needs.
    assert not any("attn" in name for name in names)


def test_work_that_a_reused_step_needs_is_not_deferred():
    region = deferred_of(TwoStreams(), two_streams_call(), Bn_compute_blocks=1)
    assert {pair.role for pair in region.live_outs} == {"hidden_states", "encoder_hidden_states"}
    assert not region.deferred  # The residual of the text is added to the text after the first block.


def test_nothing_is_deferred_past_a_write():
    assert not deferred_of(TwoStreams(writes=True), two_streams_call()).deferred
