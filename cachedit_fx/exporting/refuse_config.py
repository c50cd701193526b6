"""The fields of a configuration that cannot be part of an exported graph, with the reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.exporting.tensor_factors import FORECASTER_NAMES, has_tensor_form


@dataclass(frozen=True, slots=True)
class _Rule:
    """What an exported graph asks of a field.

    Attributes:
        allows: Whether a value can be exported.
        allowed: The values that can, in words.
        reason: Why others cannot: a clause.
        cure: What to do instead.
    """

    field: str
    allows: Callable[[Any], bool]
    allowed: str
    reason: str
    cure: str


_RULES = (
    _Rule(
        "decider",
        lambda value: value is None,
        "None",
        "a decider is Python code, and an exported graph runs without Python",
        "express the decision by the threshold, which is an input of every step, or by steps_computation_mask",
    ),
    _Rule(
        "forecaster",
        lambda value: value is None or has_tensor_form(value),
        f"None or one of {', '.join(FORECASTER_NAMES)} with by='step'",
        "the numbers of a forecast are computed in Python, and only these forecasters have them as tensor operations",
        "give one of them, or forecaster=None to add the last residual",
    ),
    _Rule(
        "probe",
        lambda value: value != "timestep",
        "'fn_residual', 'modulated_input' or 'none'",
        "the rule Magnitude looks its ratios up in Python",
        "give policy=Threshold(...) or policy=Budget(...)",
    ),
    _Rule(
        "shadow",
        lambda value: not value,
        "False",
        "shadow mode computes every step, and compares in Python",
        "use enable_cache to measure the errors, and export without shadow",
    ),
    _Rule(
        "force_refresh_step_hint",
        lambda value: value is None,
        "None",
        "the caller holds the state",
        "pass initial_state() at the step that is to be refreshed",
    ),
    _Rule(
        "cache_device",
        lambda value: value is None,
        "None",
        "the caller holds the state",
        "move the state that a step returns",
    ),
    _Rule(
        "start_percent",
        lambda value: not value,
        "0.0",
        "an exported step does not know how many steps a generation has",
        "give steps_computation_mask with these steps as 1",
    ),
    _Rule(
        "end_percent",
        lambda value: value >= 1,
        "1.0",
        "an exported step does not know how many steps a generation has",
        "give steps_computation_mask with these steps as 1",
    ),
    _Rule(
        "final_compute_steps",
        lambda value: not value,
        "0",
        "an exported step does not know how many steps a generation has",
        "give steps_computation_mask with these steps as 1",
    ),
    _Rule(
        "cfg_diff_compute_separate",
        lambda value: bool(value),
        "True",
        "every guidance branch has a state of its own, and a step sees no other",
        "leave it at its default",
    ),
    _Rule(
        "guidance_reuse",
        lambda value: value == "off",
        "'off'",
        "every guidance branch has a state of its own, and a step sees no other",
        "leave it at its default",
    ),
    _Rule(
        "enable_dynamic_prune_threshold",
        lambda value: not value,
        "False",
        "one threshold, which is an input of every step, applies to all regions",
        "leave it at its default",
    ),
)


def check_exportable(config: CacheConfig) -> None:
    """Checks that everything in a configuration can be part of an exported graph.

    Raises:
        ConfigError: A field has a value that cannot.
    """
    for rule in _RULES:
        value = getattr(config, rule.field)
        if not rule.allows(value):
            raise ConfigError(
                f"cachedit_fx: {rule.field} must be {rule.allowed} in an exported graph, got {shown(value)}: "
                f"{rule.reason}.\nWhat to do: {rule.cure}."
            )
