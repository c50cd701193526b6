"""Capture of modules that read numbers from tensors, on which Dynamo cannot guard."""

from __future__ import annotations

import torch
from torch import Tensor

import cachedit_fx
from tests.sessions import every_session
from tests.synthetic import Transformer, make_inputs

COMPUTE_REUSE = ["warmup", "threshold-one"]


class ReadsNumbers(Transformer):
    """Reads as many numbers as a tensor says. Dynamo cannot capture `tolist` without knowing how many there are."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        marks = hidden_states.flatten()[:4].isfinite().long()
        numbers = marks[: int(marks.sum())].tolist()
        return super().forward(hidden_states * len(numbers), timestep)


def test_a_number_on_which_dynamo_cannot_guard_makes_the_next_capture_strategy_take_over():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ReadsNumbers().eval()
    calls = [make_inputs(model, seed=0, time=time) for time in (0.9, 0.8)]
    with torch.no_grad():
        expected = [model(**call)[0] for call in calls]
        cachedit_fx.enable_cache(
            model, max_warmup_steps=1, residual_diff_threshold=1.0, inner_backend="eager", on_no_match="raise"
        )
        outputs = [model(**call)[0] for call in calls]
    (session,) = every_session(model)
    assert session.decisions == COMPUTE_REUSE
    torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=0)
    assert not torch.equal(outputs[1], expected[1])
