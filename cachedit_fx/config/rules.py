"""The rules that `CacheConfig.policy` selects from, each with the settings that it reads.

`CacheConfig` stores them in fields of its own: `policy=Budget(0.3)` and `decision_rule="budget",
residual_diff_threshold=0.3` are two spellings of one configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cachedit_fx.config.options import option, options_of, settle
from cachedit_fx.config.synonyms import SYNONYMS
from cachedit_fx.errors import ConfigError, did_you_mean, shown


@dataclass(frozen=True)
class Rule:
    """What decides whether a step may be reused once warm-up, masks and limits allow it.

    The rules are `Threshold`, `Budget` and `Magnitude`. For one of your own see `Decider`.
    """

    name: ClassVar[str]
    implied: ClassVar[dict[str, Any]]  # The fields of `CacheConfig` that the rule's name alone decides.

    def __new__(cls, *args: Any, **given: Any) -> Self:
        for name, value in given.items():
            if name not in options_of(cls):
                allowed = options_of(cls)
                stored = {declared.flat: setting for setting, declared in allowed.items()}
                meant = {other: stored[flat] for other, flat in SYNONYMS.items() if flat in stored} | stored
                raise ConfigError(
                    f"cachedit_fx: field {name!r} (given {shown(value)}) of {cls.__name__} is unknown."
                    f"{did_you_mean(name, allowed, meant)}\nAllowed: {', '.join(allowed)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        settle(self, f"{type(self).__name__}.")

    @property
    def mapping(self) -> dict[str, Any]:
        """What `as_rule` makes this rule of: its name, and the settings that are not at their defaults."""
        settings = {name: getattr(self, name) for name in options_of(type(self))}
        changed = {name: v for name, v in settings.items() if v != options_of(type(self))[name].default}
        return {"type": self.name} | changed

    @property
    def flat(self) -> dict[str, Any]:
        """The fields of `CacheConfig` that the rule sets. A setting that is None leaves its field as it is."""
        own = {declared.flat: getattr(self, name) for name, declared in options_of(type(self)).items()}
        return {**self.implied, **{name: value for name, value in own.items() if value is not None}}


@dataclass(frozen=True)
class Threshold(Rule):
    """Reuses a step while the residual diff since the last computed step is small."""

    name: ClassVar[str] = "threshold"
    implied: ClassVar[dict[str, Any]] = dict(decision_rule="threshold", rescale_coefficients=(), magnitude_ratios=())

    threshold: float | None = option(
        None,
        flat="residual_diff_threshold",
        doc="The step is reused if the residual diff is strictly below this. At 0 or less no step is reused; at 1 or "
        "more the residual diff is not measured and every step is. None: `residual_diff_threshold`.",
    )


@dataclass(frozen=True)
class Budget(Rule):
    """Reuses steps until the changes of the probe from step to step add up to a budget.

    Source: TeaCache (arXiv:2411.19108).
    """

    name: ClassVar[str] = "budget"
    implied: ClassVar[dict[str, Any]] = dict(decision_rule="budget", magnitude_ratios=())

    budget: float | None = option(
        None,
        flat="residual_diff_threshold",
        doc="Steps are reused while the sum of the changes since the last computed step is strictly below this. "
        "None: `residual_diff_threshold`.",
    )
    coefficients: Sequence[float] = option(
        (),
        flat="rescale_coefficients",
        doc="Polynomial that is applied to a change before it is added, highest power first. Empty: none.",
    )


@dataclass(frozen=True)
class Magnitude(Rule):
    """Reuses steps until the errors that the residual's magnitudes predict add up to a threshold.

    Nothing is measured while the model runs. Implies `probe="timestep"`, which holds for the whole model.

    Source: MagCache (arXiv:2506.09045).
    """

    name: ClassVar[str] = "magnitude"
    implied: ClassVar[dict[str, Any]] = dict(decision_rule="budget", probe="timestep", rescale_coefficients=())

    ratios: Sequence[float] = option(
        (),
        flat="magnitude_ratios",
        above=0,
        not_empty=True,
        doc="Per step, the magnitude of the residual over that of the step before, as a calibration run measured it. "
        "Steps beyond their end are computed.",
    )
    threshold: float | None = option(
        None,
        flat="residual_diff_threshold",
        doc="Steps are reused while the sum of the predicted errors since the last computed step is strictly below "
        "this. None: `residual_diff_threshold`.",
    )


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Threshold, Budget, Magnitude)}


def flat_spelling(rule: type[Rule], name: str) -> Any:
    """A field of `CacheConfig` that stores a field of a rule."""
    declared = options_of(rule)[name]
    label = f"{rule.__name__}.{name}"
    return option(
        declared.default, doc=f"The same as `{label}`.", flat_of=label, minimum=declared.minimum, above=declared.above
    )


def as_rule(value: object) -> Rule | type[Rule]:
    """A policy as it may be given: a rule, its name (which leaves the rule's settings as they are), or a mapping.

    A mapping is the rule's name under "type" and its settings, as files have it: `{"type": "budget", "budget": 0.3}`.

    Raises:
        ConfigError: It is none of these, or a setting of the rule is unknown or has a value that is not allowed.
    """
    if isinstance(value, Rule):
        return value
    settings = dict(value) if isinstance(value, Mapping) else {}
    name = settings.pop("type", None) if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in RULES:
        hint = did_you_mean(name, RULES) if isinstance(name, str) else ""
        raise ConfigError(
            f"cachedit_fx: policy must be a rule of cachedit_fx.policies, one of the names "
            f"{', '.join(map(repr, RULES))}, or a mapping with one of them under 'type', got {shown(value)}.{hint}"
        )
    rule = RULES[name]
    return rule(**{str(setting): value for setting, value in settings.items()}) if isinstance(value, Mapping) else rule


def rule_of(config: Any) -> Rule:
    """The rule that a `CacheConfig` stores, with its settings."""
    is_magnitude = config.decision_rule == "budget" and config.probe == "timestep" and config.magnitude_ratios
    rule = Magnitude if is_magnitude else RULES[config.decision_rule]
    return rule(**{name: getattr(config, declared.flat) for name, declared in options_of(rule).items()})


def spelled_out(given: Mapping[str, Any], *, is_replacing: bool = False) -> dict[str, Any]:
    """The given options of a `CacheConfig` with `policy` replaced by the fields that it stands for.

    Args:
        is_replacing: Every other field was given its present value, as `dataclasses.replace` does, so that `policy`
            takes precedence over them.

    Raises:
        ConfigError: The policy is not allowed, or one of the other options contradicts it.
    """
    found = dict(given)
    if "policy" not in found:
        return found
    policy = as_rule(found.pop("policy"))
    flat = policy.flat if isinstance(policy, Rule) else policy.implied
    if is_replacing:
        return without_leftover_probe(found, flat) | flat
    for name, value in flat.items():
        other = found.get(name, value)
        if value != (tuple(other) if isinstance(other, list) else other):
            raise ConfigError(
                f"cachedit_fx: policy={shown(given['policy'])} sets {name}={shown(value)}, got {name}={shown(other)} "
                "as well; give only one of the two, or equal values."
            )
    return found | flat


def without_leftover_probe(fields: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`fields`, without the probe that a `Magnitude` implied if `changed` selects another rule."""
    is_left_over = not changed.get("magnitude_ratios", True) and "probe" not in changed
    return {name: v for name, v in fields.items() if not (is_left_over and name == "probe" and v == "timestep")}
