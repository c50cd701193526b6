"""The interface of a policy that a user writes: `Decider`, and the view of a step that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.policies.history import History


@dataclass(frozen=True, slots=True)
class StepView:
    """A step that is about to be decided, in one region of one session.

    Attributes:
        region: The blocks of the region, for example `transformer_blocks[1:]`.
        number: The number of the step in the session, from 0.
        num_inference_steps: The number of steps of the generation; None if neither the scheduler of a pipeline nor the
            configuration gives it.
        timestep: The timestep; None if the model has none.
        diff: The residual diff, dimensionless (with decision_rule "budget": the relative L1 change since the previous
            step). NaN if nothing is measured or nothing is cached.
        threshold: The threshold that the rules would compare it with.
        is_cached: Whether there are cached values that can be reused. Without them the step is computed, whatever the
            answer is.
        history: The previous steps of the region.
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
    """Decides in place of the rules (`CacheConfig(decider=...)`), once per step, region and guidance branch.

    It must be hashable. One object serves all sessions and threads of a model, and manages its own state. An error that
    it raises ends the call of the model and leaves the session as it was before the step.
    """

    def decide(self, step: StepView) -> bool | None:
        """Returns True to compute, False to reuse in spite of warm-up, masks and limits, None to let the rules decide.

        A step for which nothing is cached, or before the timestep has changed, is computed in any case.
        """


def ask(decider: Decider, step: StepView) -> bool | None:
    """The answer of a decider.

    Raises:
        ConfigError: The answer is not True, False or None.
    """
    answer = decider.decide(step)
    if answer is None or isinstance(answer, bool):
        return answer
    raise ConfigError(
        f"cachedit_fx: decider must return True (compute), False (reuse) or None (let the rules decide), got "
        f"{shown(answer)} from {type(decider).__name__}.decide"
    )
