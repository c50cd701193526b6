"""The two branches of an exported region: what they compute of the model, and of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachedit_fx.exporting.state_layout import RegionLayout
from cachedit_fx.exporting.tensor_forecast import TensorTimes, forecast, verdict_after

Branch = Callable[..., Sequence[Tensor]]
Histories = Sequence[Sequence[Tensor]]  # For each live-out, its cached values, newest first.
Result = tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class RegionBranches:
    """The branches of `torch.cond`. Both return the live-outs, the histories and the verdicts of the forecasts.

    A branch must return neither its operands nor two aliases of one tensor, also after a compiler has removed copies.
    Therefore `_output` and `_cached` select everything by a condition, whose value no compiler knows.
    """

    layout: RegionLayout
    run: Branch
    add: Branch

    def compute(
        self,
        is_computed: Tensor,
        is_reused: Tensor,
        inputs: Sequence[Tensor],
        histories: Histories,
        verdicts: Sequence[Tensor],
        times: Sequence[Any],
    ) -> Result:
        count, covered, forecaster = len(histories), self.layout.covered, self.layout.forecaster
        found = self.run(*inputs, *(history[0] for history in histories))
        new, judged, unused = [], [], [*verdicts]
        for value, history, is_covered in zip(found[count:], histories, covered, strict=True):
            new.append(tuple(_cached(is_reused, tensor) for tensor in (value, *history[:-1])))
            if is_covered and forecaster is not None:
                verdict = verdict_after(forecaster, history, value, unused.pop(0), TensorTimes(*times))
                judged.append(verdict & is_computed)
        return tuple(_output(is_computed, output) for output in found[:count]), tuple(new), tuple(judged)

    def reuse(
        self,
        is_computed: Tensor,
        is_reused: Tensor,
        inputs: Sequence[Tensor],
        histories: Histories,
        verdicts: Sequence[Tensor],
        times: Sequence[Any],
    ) -> Result:
        count, covered, forecaster = len(histories), self.layout.covered, self.layout.forecaster
        values, unused = [], [*verdicts]
        for history, is_covered in zip(histories, covered, strict=True):
            value = history[0]
            if is_covered and forecaster is not None:
                value = forecast(forecaster, history, unused.pop(0), TensorTimes(*times))
            values.append(value)
        found = self.add(*inputs, *values)
        outputs = tuple(_output(is_reused, output) for output in found[:count])
        same = tuple(tuple(_cached(is_computed, tensor) for tensor in history) for history in histories)
        return outputs, same, tuple(verdict & is_reused for verdict in verdicts)


def _output(is_true: Tensor, tensor: Tensor) -> Tensor:
    return torch.where(is_true, tensor, tensor.new_zeros(())).contiguous()


def _cached(is_false: Tensor, tensor: Tensor) -> Tensor:
    # Not the expression of `_output`, because equal expressions would become one tensor.
    return torch.where(is_false, tensor.new_zeros(()), tensor).contiguous()
