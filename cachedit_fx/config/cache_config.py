"""What can a user set: `CacheConfig`, and how `options=` of `torch.compile` become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cachedit_fx.config.checks import check_together as check_together
from cachedit_fx.config.fields import FIELD_NAMES as FIELD_NAMES
from cachedit_fx.config.fields import OPTION_NAMES as OPTION_NAMES
from cachedit_fx.config.fields import OPTIONS, Fields
from cachedit_fx.config.fields import CacheType as CacheType
from cachedit_fx.config.options import settle
from cachedit_fx.config.reference import with_attributes
from cachedit_fx.config.rules import Rule, Threshold, rule_of, spelled_out, without_leftover_probe
from cachedit_fx.config.synonyms import NO_COUNTERPART, SYNONYMS
from cachedit_fx.errors import ConfigError, did_you_mean, listed, shown
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.forecaster_registry import as_mapping, forecasters

Changes = tuple[tuple[str, Any], ...]  # Names and values of some fields, by name.


class _AcceptsPolicy(type):
    """Lets a configuration be made with `policy`, which the other fields store."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        if "policy" in fields:
            given = dict(zip(FIELD_NAMES, args, strict=False)) | fields
            args, fields = (), spelled_out(given, is_replacing=given.keys() >= {*FIELD_NAMES})
        return super().__call__(*args, **fields)


@dataclass(frozen=True, eq=False)
class CacheConfig(Fields, metaclass=_AcceptsPolicy):
    """When a step may be reused, and how the graphs are compiled.

    The defaults are what this package recommends. `enable_cache`, `torch.compile(backend="cachedit")`, `explain` and
    `tune` all start from them, and setting one field never changes the default of another. cache-dit's
    defaults are those of `DBCacheConfig`. Two configurations are equal if all their fields are, whichever class made
    them. Down to `non_prune_block_ids`, the names and their meaning are cache-dit's.

    The rule that decides is given as `policy`, with its settings: `CacheConfig(policy=Budget(0.3))`, with the rules of
    `cachedit_fx.policies`. It is stored in `decision_rule` and the fields that the rule sets, which may also be given
    themselves; `policy` is read from them.

    Raises:
        ConfigError: (a ValueError) a field has a value that is not allowed, or `policy` contradicts another field.
    """

    if TYPE_CHECKING:
        policy: Rule = Threshold()
    else:

        @property
        def policy(self) -> Rule:
            """The rule that decides, with its settings."""
            return rule_of(self)

    _given_by_class: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        for name, value in fields.items():
            if name not in cls.__dataclass_fields__:
                raise ConfigError(unknown_option(name, value))
        config = super().__new__(cls)
        object.__setattr__(config, "_given", frozenset((*FIELD_NAMES[: len(args)], *fields, *cls._given_by_class)))
        return config

    def __post_init__(self) -> None:
        settle(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheConfig) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in FIELD_NAMES)

    @staticmethod
    def cache_dit_defaults(**fields: Any) -> DBCacheConfig:
        """cache-dit's defaults, with other values for `fields`: the same as `DBCacheConfig(**fields)`.

        Raises:
            ConfigError: A field is unknown or has a value it cannot have.
        """
        return DBCacheConfig(**fields)

    @property
    def given(self) -> frozenset[str]:
        """The names of the fields that the caller set. A `ParamsModifier` overrides these."""
        names: frozenset[str] = self.__dict__["_given"]
        return names

    @property
    def changes(self) -> Changes:
        """The given fields with their values: unlike two configurations, not equal if one only spells a default out."""
        return tuple((name, getattr(self, name)) for name in sorted(self.given))

    @property
    def structure(self) -> Changes:
        """The fields that a graph is built by, with their values."""
        return tuple((name, getattr(self, name)) for name, o in OPTIONS.items() if o.structural)

    @property
    def runtime_fields(self) -> Changes:
        """The other fields, with their values: they are read at run time."""
        return tuple((name, getattr(self, name)) for name, o in OPTIONS.items() if not o.structural)

    def override(self, changes: CacheConfig | Changes | None = None, **fields: Any) -> Self:
        """This configuration with other values: those that another configuration was given, and `fields`.

        `dataclasses.replace` counts every field as given; this one does not.

        Raises:
            ConfigError: A field is unknown or has a value it cannot have.
        """
        found = dict(self.changes)
        for changed in (
            dict(changes.changes if isinstance(changes, CacheConfig) else changes or ()),
            spelled_out(fields),
        ):
            found = without_leftover_probe(found, changed) | changed
        return type(self)(**found)

    def reset(self, **fields: Any) -> Self:
        """A partial configuration for `ParamsModifier` that has only `fields`, and no other value of this one."""
        return type(self)(**fields)

    @property
    def plain_changes(self) -> list[tuple[str, Any]]:
        """For a file: what `CacheConfig` must be given to make this configuration.

        These are the given fields, and those whose default in another class differs. A forecaster is written as its
        mapping. What is code is left out: a decider; of a forecaster without a name None is written.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(CacheConfig)}
        named = [n for n in sorted(FIELD_NAMES) if n in self.given or getattr(self, n) != defaults[n]]
        return [(name, _plain(getattr(self, name))) for name in named if name != "decider"]

    @property
    def shown_changes(self) -> dict[str, Any]:
        """`plain_changes` for a reader: the rule and its settings, if given, are shown as a mapping."""
        changes = dict(self.plain_changes)
        if "decision_rule" not in changes:
            return changes
        return {n: value for n, value in changes.items() if n not in self.policy.flat} | {"policy": self.policy.mapping}


CacheConfig.__doc__ = with_attributes(CacheConfig.__doc__, OPTIONS)
DEFAULT_WARMUP_STEPS = 8  # The most warm-up steps where `max_warmup_steps` is None.
RECOMMENDED = CacheConfig()  # What every way in starts from, by name.


@dataclass(frozen=True, eq=False)
class DBCacheConfig(CacheConfig):
    """`CacheConfig` with cache-dit's defaults, under cache-dit's name; also called `BasicCacheConfig`.

    Where it overrides another configuration (`override`, `ParamsModifier`, `refresh_context`), its given fields do and
    its defaults do not, as with `CacheConfig`.
    """

    Fn_compute_blocks: int = 8
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int | None = 8
    forecaster: Forecaster | None = None


@dataclass(frozen=True, eq=False)
class DBPruneConfig(DBCacheConfig):
    """`DBCacheConfig` with `cache_type="DBPrune"`, which counts as given."""

    cache_type: str = CacheType.DBPrune

    _given_by_class: ClassVar[tuple[str, ...]] = ("cache_type",)


def _plain(value: Any) -> Any:
    if not isinstance(value, Forecaster):
        return value
    return as_mapping(value) if type(value) in forecasters().values() else None


def split_options(options: Mapping[str, Any], base: CacheConfig | None = None) -> tuple[CacheConfig, dict[str, Any]]:
    """`base` with our options set, and the options that are Inductor's.

    Raises:
        ConfigError: An option is neither ours nor, where the inner backend is Inductor, Inductor's.
    """
    base = base or CacheConfig()
    ours = {name: value for name, value in options.items() if name in OPTION_NAMES}
    rest = {name: value for name, value in options.items() if name not in OPTION_NAMES}
    config = base.override(**ours)
    check_together(config)
    known = _inductor_options() if config.inner_backend == "inductor" else ()
    for name, value in rest.items():
        if str(name).replace("-", "_") not in known:
            others = "and every option of Inductor (torch._inductor.list_options())" if known else ""
            raise ConfigError(unknown_option(name, value, known, others=others))
    return config, rest


def _inductor_options() -> tuple[str, ...]:
    import torch

    return tuple(torch._inductor.list_options())


def unknown_option(
    name: object, value: object, known: Sequence[str] = (), *, others: str = "", what: str = "option"
) -> str:
    """What to say of an option that is neither ours nor among the `known` ones, which `others` tells."""
    allowed = [*OPTION_NAMES, *filter(None, [others])]
    reason = NO_COUNTERPART.get(str(name).lower(), "")
    hint = f" {reason}" if reason else did_you_mean(name, (*OPTION_NAMES, *known), SYNONYMS, words_of=OPTION_NAMES)
    return (
        f"cachedit_fx: {what} {name!r} (given {shown(value)}) is unknown.{hint}\n"
        f"{listed([f'Allowed: {allowed[0]}', *allowed[1:]])}."
    )
