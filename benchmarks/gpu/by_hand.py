"""A reference that shares no code with cachedit_fx: the model runs eagerly, and blocks are skipped by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.work import Work, chain


class ByHand:
    """Runs a transformer eagerly. At a reused step, only the first `front` blocks run.

    At a computed step, the residual is what the other blocks add to the hidden stream. At a reused step, the residual
    of the last computed step is added instead. Each guidance branch has a residual of its own.
    """

    def __init__(self, work: Work, model: nn.Module, front: int = 1) -> None:
        self.model = model
        self.blocks = [getattr(model, name)[i] for name, i in chain(work, model)][front:]
        self.residuals: dict[str, Tensor] = {}
        self._returns_text: dict[nn.Module, bool] = {}

    def __call__(self, guidance_branch: str, inputs: dict[str, Any], *, computes: bool) -> Tensor:
        """Returns the output of the model for one step of one guidance branch."""
        with torch.no_grad(), self._replaced(guidance_branch, computes):
            output: Tensor = self.model.forward(**inputs)[0]
        return output

    @contextmanager
    def _replaced(self, guidance_branch: str, computes: bool) -> Iterator[None]:
        try:
            for block in self.blocks:
                block.forward = self._forward(block, guidance_branch, computes)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _forward(self, block: nn.Module, guidance_branch: str, computes: bool) -> Callable[..., Any]:
        original, is_last = block.forward, block is self.blocks[-1]
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            hidden = given["hidden_states"]
            if block is self.blocks[0]:
                self._entered = hidden
            if computes:
                result = original(*args, **kwargs)
                self._returns_text[block] = isinstance(result, tuple)
                if is_last:  # Blocks of diffusers return (encoder_hidden_states, hidden_states).
                    left = result[-1] if isinstance(result, tuple) else result
                    self.residuals[guidance_branch] = left - self._entered
                return result
            if is_last:
                hidden = self._entered + self.residuals[guidance_branch]
            return (given["encoder_hidden_states"], hidden) if self._returns_text[block] else hidden

        return forward


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest |found - expected| / |expected| (norms, in float64) of any output; infinite if it is NaN."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        wide = other.double()
        error = ((one.double() - wide).norm() / wide.norm().clamp_min(1e-30)).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def are_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all outputs are bitwise equal."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
