"""What a case is: a model nobody prepared for, how it is called, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.patterns import Cause
from tests.researchers import dit
from tests.researchers.port_reference import HIDDEN, Port

BATCH, TEXT, TEXT_WIDTH = 2, 5, 12
TIMES = (0.9, 0.8, 0.7)

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]  # The model, latents, a timestep, a prompt -> its output.


@dataclass(frozen=True)
class Cached:
    """The chain is found.

    Attributes:
        f1b0, f2b1: Name of the region with one Fn block, and with two and a Bn block.
        pattern: What every list of the chain matches, as the label begins.
    """

    f1b0: str
    f2b1: str
    pattern: str

    def __str__(self) -> str:
        return f"cached as region {self.f1b0} (F2B1: {self.f2b1}), pattern {self.pattern}"


@dataclass(frozen=True)
class Refused:
    """The model runs as it is.

    Attributes:
        cause: Why; None where only the end of a call tells, from all its graphs.
        said: What the message says of it: a regular expression that leads the model's author to the cure.
    """

    cause: Cause | None
    said: str

    def __str__(self) -> str:
        return f"not cached{f', {self.cause.value}' if self.cause else ''}: {self.said}"


@dataclass(frozen=True)
class Case:
    """A model and its outcome.

    Attributes:
        model: Makes it.
        outcome: What becomes of it.
        latents: Their shape.
        prompt: Makes what stays the same object throughout a generation.
        call: How the model is called.
        timestep: From the time, 1 to 0, to the timestep that is passed.
        port: Where its blocks have their streams.
        dynamo: What of Dynamo's configuration the model's users have to set.
        ran: With which counts how many calls a reused step runs in front and at the end, where these are not as many as
            the counts say: a block of the chain may be several calls, and what follows the last block is not skipped.
        decisions: Reasons of the three decisions.
        bare: What becomes of it with the bare backend, where that is something else.
        tolerance: Of a reused step against the one by hand; 0 is bitwise.
    """

    model: Callable[[], nn.Module]
    outcome: Cached | Refused
    latents: tuple[int, ...] = (BATCH, dit.CHANNELS, dit.SIDE, dit.SIDE)
    prompt: Callable[[], Tensor] = lambda: torch.tensor([1, 7])
    call: Call = lambda model, x, t, y: model(x, t, y)
    timestep: Callable[[float], Any] = lambda time: torch.full((BATCH,), time)
    port: Port = HIDDEN
    dynamo: tuple[tuple[str, Any], ...] = ()
    ran: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    decisions: tuple[str, str, str] = ("warmup", "threshold-one", "max-continuous")
    bare: Cached | Refused | None = None
    tolerance: float = 0.0

    def outcome_by(self, surface: str) -> Cached | Refused:
        return self.bare if surface == "backend" and self.bare is not None else self.outcome

    def calls(self) -> list[Callable[[nn.Module], Any]]:
        """The three steps of a generation."""
        prompt = self.prompt()
        return [self._call_at(time, prompt) for time in TIMES]

    def _call_at(self, time: float, prompt: Tensor) -> Callable[[nn.Module], Any]:
        generator = torch.Generator().manual_seed(round(100 * time))
        latents, timestep = torch.randn(self.latents, generator=generator), self.timestep(time)
        # A model may write into what it is given.
        return lambda model: self.call(model, latents.clone(), timestep, prompt)


def text() -> Tensor:
    """An embedded prompt, [B, T, D]."""
    return torch.randn(BATCH, TEXT, TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
