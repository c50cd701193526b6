"""A case: a model without special support, how it is called, and the expected outcome."""

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
    """Outcome: the chain is found, and the model is cached.

    Attributes:
        f1b0, f2b1: Name of the region with one Fn block, and with two Fn blocks and one Bn block.
        pattern: The pattern that every list of the chain matches: the beginning of its label.
    """

    f1b0: str
    f2b1: str
    pattern: str

    def __str__(self) -> str:
        return f"cached as region {self.f1b0} (F2B1: {self.f2b1}), pattern {self.pattern}"


@dataclass(frozen=True)
class Refused:
    """Outcome: the model runs uncached.

    Attributes:
        cause: The cause; None if it is only determined at the end of a call, from all its graphs.
        message: A regular expression for the part of the message that tells the author of the model what to do.
    """

    cause: Cause | None
    message: str

    def __str__(self) -> str:
        return f"not cached{f', {self.cause.value}' if self.cause else ''}: {self.message}"


@dataclass(frozen=True)
class Case:
    """A model and its expected outcome.

    Attributes:
        model: Creates the model.
        outcome: The expected outcome.
        latents: Shape of the latents.
        prompt: Creates the prompt, which stays the same object throughout a generation.
        call: Calls the model.
        timestep: Maps the time, 1 to 0, to the timestep that is passed.
        port: Where the streams are in the arguments and results of the blocks.
        dynamo: Options of Dynamo that users of the model have to set.
        ran: Name of the counts -> the numbers of block calls that a reused step runs at the front and at the end, if
            they differ from the counts: a block of the chain may be several calls, and calls after the last block of
            the chain are not skipped.
        decisions: Reasons of the three decisions.
        bare: The outcome with the bare backend, if it differs.
        tolerance: Absolute tolerance for a reused step against the one by hand; 0 is bitwise.
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
        # A model may write into its inputs.
        return lambda model: self.call(model, latents.clone(), timestep, prompt)


def text() -> Tensor:
    """An embedded prompt, [B, T, D]."""
    return torch.randn(BATCH, TEXT, TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
