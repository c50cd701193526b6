"""A small transformer with a known result, with which `doctor` checks that caching works on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.integrations.pipelines import disable_cache, enable_cache
from cachedit_fx.runtime.instances import calls_of

NUM_BLOCKS = 4
NUM_STEPS = 3
_WIDTH = 8


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.layer(hidden_states + embedding))


class SmallTransformer(nn.Module):
    """Blocks that add to `hidden_states`, float32 [batch, tokens, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(NUM_BLOCKS))
        self.project = nn.Linear(_WIDTH, _WIDTH)

    def embedding(self, timestep: Tensor) -> Tensor:
        embedded: Tensor = self.embed(timestep[:, None].float())
        return embedded[:, None]

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.embedding(timestep)
        for block in self.blocks:
            hidden_states = block(hidden_states, embedding)
        projected: Tensor = self.project(hidden_states)
        return projected

    def reused(self, first: tuple[Tensor, Tensor], call: tuple[Tensor, Tensor]) -> Tensor:
        """The output of `call` if only the first block runs, and the others add what they added in the call `first`."""
        own, before = (self.blocks[0](hidden, self.embedding(timestep)) for hidden, timestep in (call, first))
        after = before
        for block in [*self.blocks][1:]:
            after = block(after, self.embedding(first[1]))
        projected: Tensor = self.project(own + (after - before))
        return projected


def why_not_cached() -> str:
    """Runs a generation with the cache, and returns what went wrong in one line; empty if nothing did.

    The first step is computed, and the others must be reused with the right result. Nothing is compiled by Inductor.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model, hidden = SmallTransformer().eval(), torch.randn(1, 6, _WIDTH)
        calls = [(hidden, torch.tensor([1.0 - 0.1 * step])) for step in range(NUM_STEPS)]
        expected = [model(*calls[0]), *(model.reused(calls[0], call) for call in calls[1:])]
        with _quiet():
            enable_cache(model, **_FIELDS)
            found = [model(*call) for call in calls]
            disable_cache(model)
    (counts,) = calls_of(model).values()
    if counts.uncached or counts.reused != NUM_STEPS - 1:
        return next(iter(counts.reasons), f"{counts.reused} of {NUM_STEPS - 1} steps were reused")
    if not torch.equal(found[0], expected[0]):
        return "the output of a computed step differs from the output without the cache"
    if not all(map(torch.allclose, found, expected)):
        return "the output of a reused step is wrong"
    return ""


_FIELDS: dict[str, Any] = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1.0,
    "forecaster": None,
    "inner_backend": "eager",
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings of this package; what they say is returned."""
    log = logging.getLogger("cachedit_fx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
