"""A user's own policy: `Decider`, and what it is shown of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.policies.history import History


@dataclass(frozen=True, slots=True)
class StepView:
    """A step that is to be decided, of one region of one session.

    Attributes:
        region: The region's blocks, as in `transformer_blocks[1:]`.
        number: The step's number in the session, from 0.
        num_inference_steps: How many there will be, if that was told.
        timestep: None where the model has none.
        diff: Relative L1 distance of what is looked at, from the last computed step (with decision_rule "budget": from
            the step before); NaN where nothing is looked at or nothing is kept.
        threshold: What the rules would hold it against.
        is_cached: Whether anything is kept that may be reused; without it the step is computed, whatever is answered.
        history: What the region did before.
    """

    region: str
    number: int
    num_inference_steps: int | None
    timestep: float | None
    diff: float
    threshold: float
    is_cached: bool
    history: History


class Decider(Protocol):
    """Decides in place of the rules: `CacheConfig(decider=...)`. Asked once per step, region and guidance branch.

    It is hashable, and one object serves all sessions and threads of a model: what it keeps between two calls is its
    own affair. An error that it raises ends the model's call, and leaves the session as it was before the step.
    """

    def decide(self, step: StepView) -> bool | None:
        """True: compute. False: reuse, whatever warm-up, masks and limits say. None: as the rules say.

        A step where nothing is kept, or before the timestep has moved, is computed all the same.
        """


def ask(decider: Decider, step: StepView) -> bool | None:
    """The decider's answer.

    Raises:
        ConfigError: It is no answer.
    """
    answer = decider.decide(step)
    if answer is None or isinstance(answer, bool):
        return answer
    raise ConfigError(
        f"cachedit_fx: decider must answer True (compute), False (reuse) or None (as the rules say), got "
        f"{shown(answer)} from {type(decider).__name__}.decide"
    )
