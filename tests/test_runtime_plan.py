"""`make_runtime_plan` derives one record from the plan and the configuration alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cachedit_fx import CacheConfig
from cachedit_fx.passes.analysis.runtime_plan import NUM_CHECKSUMS, make_runtime_plan
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import MismatchError
from tests.synthetic import DualStream, SelfBlock, Transformer
from tests.variants import Variant, planned


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_the_runtime_plan_describes_the_graph():
    plan = planned(DualStream(), Bn_compute_blocks=1)
    found = make_runtime_plan(plan, CacheConfig())
    placeholders = [node for node in plan.program.nodes if node.op == "placeholder"]
    (region,) = found.regions
    assert (region.name, region.has_probe) == ("blocks[1:3]", True)
    assert region.roles == ("hidden_states", "encoder_hidden_states")
    assert region.sizes(())[0][0] == tuple(plan.regions[0].probed_at.meta["example_value"].shape)
    paths = [placeholders[weight].meta["cachedit_input"].path for weight in found.weights]
    assert [path.split(".")[1] for path in paths] == ["0", "1", "2", "3"]
    assert placeholders[found.conditioning] is plan.conditioning
    assert (found.has_timestep, found.num_checksums, found.effect) == (True, 0, "")
    assert found.region_paths == ("blocks.1", "blocks.2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.effect = "draws random numbers"


def test_regions_that_run_the_same_operations_have_one_key():
    one, same = (make_runtime_plan(planned(Transformer()), CacheConfig()) for _ in range(2))
    other = make_runtime_plan(planned(Transformer(), Bn_compute_blocks=1), CacheConfig())
    assert one.region_key == same.region_key != other.region_key


def test_a_conditioning_without_a_version_counter_gets_checksums():
    plan = planned(DualStream())
    with torch.inference_mode():
        assert make_runtime_plan(plan, CacheConfig()).num_checksums == NUM_CHECKSUMS


class Draws(Variant):
    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return hidden_states + torch.rand_like(hidden_states)


def test_the_runtime_plan_names_the_side_effect_of_a_graph():
    assert make_runtime_plan(planned(Draws()), CacheConfig()).effect.startswith("draws random numbers (`rand_like")


class WritesToInput(Transformer):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        hidden_states[:, :1] = 0
        return super().forward(hidden_states, timestep)


def test_a_graph_that_writes_to_its_inputs_cannot_run_in_shadow_mode():
    plan = planned(WritesToInput(SelfBlock))
    assert make_runtime_plan(plan, CacheConfig()).effect.startswith("writes in place")
    with pytest.raises(MismatchError, match="may run twice") as raised:
        make_runtime_plan(plan, CacheConfig(shadow=True))
    assert [mismatch.cause for mismatch in raised.value.mismatches] == [Cause.IN_PLACE]
