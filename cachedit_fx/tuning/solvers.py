"""The schedulers of diffusers that can take the place of a pipeline's own: `solvers_of`, `with_scheduler`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

# The solvers for flow matching. Their configurations differ in the names of their fields.
_FLOW = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
# Solvers that add noise are not tried, since they do not aim at the same image.
_SOLVERS = (*_FLOW, "DEISMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler")
# Fields that change what a solver is, so that those of another solver must not be taken over.
_OWN_FIELDS = ("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "solver_p")

# Fields that change the noise levels. A solver without them would follow other levels.
_SHAPES = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, eq=False)
class Solver:
    """A scheduler that a pipeline can use.

    Attributes:
        scheduler: The scheduler; None for a pipeline without one.
        is_own: Whether it is the scheduler that the pipeline has.
        order: The number of calls of the model in a step. The last step takes a single call.
    """

    scheduler: Any
    is_own: bool = False

    @property
    def name(self) -> str:
        return type(self.scheduler).__name__ if self.scheduler is not None else ""

    @property
    def order(self) -> int:
        # `order` of a multistep solver is 1, because it calls the model once per step.
        return int(getattr(self.scheduler, "order", 1) or 1)


def solvers_of(scheduler: Any, *, others: bool = True) -> list[Solver]:
    """Returns the scheduler and those that can be built from its configuration.

    Whether one of them runs with a pipeline is only known after it has run.

    Args:
        scheduler: The scheduler of the pipeline.
        others: Whether to return others than `scheduler`.
    """
    found = [Solver(scheduler, is_own=True)]
    config = getattr(scheduler, "config", None)
    if not others or not isinstance(config, Mapping) or not hasattr(type(scheduler), "from_config"):
        return found
    for cls in _classes(scheduler, _is_flow(scheduler)):
        if cls is type(scheduler):
            continue
        made = _made(cls, config, is_flow=_is_flow(scheduler))
        if made is not None:
            found.append(Solver(made))
    return found


@contextlib.contextmanager
def with_scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Runs a block with another scheduler, and restores that of the pipeline afterwards."""
    before = getattr(pipe, "scheduler", None)
    if scheduler is before:
        yield
        return
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def scheduler_from(name: str, config: Mapping[str, Any]) -> Any:
    """Returns a scheduler of diffusers, from the name of its class and its configuration."""
    return getattr(importlib.import_module("diffusers"), name).from_config(dict(config))


def reason_of(error: Exception) -> str:
    """Returns the text of an error, or its class if it has none, such as an assertion."""
    return str(error) or type(error).__name__


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("prediction_type") == (
        "flow_prediction"
    )


def _classes(scheduler: Any, is_flow: bool) -> list[Any]:
    """Returns the classes to try. The schedulers for flow matching name no compatible ones, so they are listed here."""
    if is_flow:
        diffusers = sys.modules.get("diffusers")  # The scheduler is one of its classes.
        known = {name: getattr(diffusers, name) for name in _FLOW if hasattr(diffusers, name)}
    else:
        known = {cls.__name__: cls for cls in getattr(scheduler, "compatibles", ())}
    return [known[name] for name in _SOLVERS if name in known]


def _made(cls: Any, config: Mapping[str, Any], *, is_flow: bool) -> Any:
    """Returns a scheduler with this configuration; None if it cannot have it."""
    accepted = inspect.signature(cls.__init__).parameters
    given = {name: value for name, value in config.items() if name not in _OWN_FIELDS}
    if is_flow:
        shift = given.get("flow_shift", given.get("shift", 1.0))
        given |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift": shift, "flow_shift": shift}
    elif given.get("prediction_type") and "prediction_type" not in accepted:
        return None
    unlike = [name for name in _SHAPES if given.get(name) and name not in accepted]
    if unlike:
        log.info("%s is not tried, because it does not have %s", cls.__name__, ", ".join(unlike))
        return None
    try:
        with _quiet():
            return cls.from_config(given)
    except Exception as error:
        log.info("%s is not tried, because it cannot be built: %s", cls.__name__, reason_of(error))
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warning of diffusers that a configuration has fields that a class does not know."""
    logger = logging.getLogger("diffusers.configuration_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
