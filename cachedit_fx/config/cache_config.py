"""What can a user set: `CacheConfig`, and how `options=` of `torch.compile` become one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cachedit_fx.config.checks import as_forecaster, check_fields
from cachedit_fx.config.checks import check_together as check_together
from cachedit_fx.errors import ConfigError, did_you_mean, listed, shown
from cachedit_fx.forecasters.foca import FoCaCalibratorConfig
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.forecaster_registry import as_mapping, forecasters

if TYPE_CHECKING:
    from cachedit_fx.policies.decider import Decider


class CacheType(StrEnum):
    """What is decided about: the middle blocks as one, or every block on its own."""

    DBCache = "DBCache"
    DBPrune = "DBPrune"


Changes = tuple[tuple[str, Any], ...]  # Names and values of some fields, by name.


@dataclass(frozen=True, eq=False)
class CacheConfig:
    """When a step may reuse, and how the pieces are compiled. Names and meaning are cache-dit's up to the fields for
    pruning; those after them are ours.

    The defaults are what this package recommends. `enable_cache`, `torch.compile(backend="cachedit")`, `explain` and
    `tune` all start from them, and a field that is set changes nothing but itself. cache-dit's defaults are those of
    `DBCacheConfig`, which `cache_dit_defaults` makes. Two configurations are equal if all their fields are, whichever
    class made them.

    Attributes:
        Fn_compute_blocks: Blocks at the front that always run; the residual over them is the probe. 0
            makes the whole chain the region: for a mask of policy "static", where nothing is looked at, or with another
            `probe`.
        Bn_compute_blocks: Blocks at the end that always run, and so correct what a reused step added.
        residual_diff_threshold: Reuse only if the relative L1 distance between the residual of the Fn blocks now and
            at the last computed step is strictly below this. 0 or less: never reuse. 1 or more: never look.
        max_warmup_steps: The first steps of a session that are computed (strictly fewer than this); with a mask, no
            more than the ones that it begins with.
        warmup_interval: During warm-up only every so-many-th step is forced to be computed.
        max_cached_steps: Reused steps per session at the most; -1 for no limit.
        max_continuous_cached_steps: Reused steps in a row at the most; -1 for no limit.
        max_accumulated_residual_diff_threshold: Compute once the diffs of the steps reused since the last computed
            step add up to this; None or 0 for no limit.
        num_inference_steps: Steps of a generation: the step after them begins a new one. None: told by the timestep,
            the conditioning and the end of the pipeline's call alone.
        steps_computation_mask: Per step 1 (compute) or 0 (may reuse); beyond its end 0 is meant. See `steps_mask`.
        steps_computation_policy: What a 0 of the mask means: "dynamic" asks the other rules, "static" reuses at once.
        force_refresh_step_hint: Before this step of a session, forget and warm up again.
        force_refresh_step_policy: "once" in a session, or "repeat": before every so-many-th step.
        enable_separate_cfg: Whether guidance calls the model once per branch. Branches are told apart whatever this
            says; False declares that there are none to share a diff (see `cfg_diff_compute_separate`).
        cfg_compute_first: The guidance branch ("uncond") is called first at every step.
        cfg_diff_compute_separate: False: the guidance branch does not look itself, but takes the diff that the other
            branch measured at this step, if it measured one and was called first.
        cache_type: "DBCache" decides about all middle blocks at once, "DBPrune" about each of them, by how far its
            input moved since it was last computed.
        enable_dynamic_prune_threshold: DBPrune: the threshold follows the mean of the first diffs of this step.
        max_dynamic_prune_threshold: What it stays below; None for twice `residual_diff_threshold`.
        dynamic_prune_threshold_relax_ratio: Factor on that mean.
        non_prune_block_ids: DBPrune: blocks that always run beside the Fn and Bn ones, by their number in the chain (in
            their list, where each list has a region of its own).
        inner_backend: The `torch.compile` backend that compiles the pieces.
        on_no_match: "fallback" compiles the uncached graph and warns once; "raise" raises `NoMatchError`.
        regions: "merged" decides once for the whole chain; "per_list" decides for every module list on its own.
        compile_blocks: "once" compiles blocks of equal structure a single time; "inline" compiles head, region and
            tail as one graph each.
        mode: `torch.compile`'s mode for the inner backend (`torch.compile` itself refuses `mode=` beside `options=`).
        forecaster: What a reused step adds: None for the last residual, or a forecast from the last few. May be given
            as files have it, `{"type": "taylorseer"}`. It remembers more than one residual, which costs memory.
        reach: What a reused step leaves out: "blocks" the middle blocks of the chain, "output" all from the Fn blocks
            to what the model returns, so that with `Fn_compute_blocks=0` next to nothing runs.
        probe: The probe: "fn_residual" what the Fn blocks added, "modulated_input" the first block's
            time-modulated norm, so that no block needs to run, "timestep" nothing but the step's place in
            `magnitude_ratios`, "none" nothing (for a mask of policy "static", or a `decider`).
        batch_decision: "mean" takes the diff over the whole batch; "any" computes if any sample's own is too large.
        decision_rule: "threshold" holds the diff since the last computed step against `residual_diff_threshold`;
            "budget" adds up the diffs from step to step since the last computed one, and reuses while their sum is
            strictly below it (1 or more is a sum like any other).
        rescale_coefficients: For decision_rule "budget": polynomial that a diff goes through before it is added up,
            highest power first.
        magnitude_ratios: For probe "timestep": per step, by how much the residual's magnitude changed since the step
            before, as a calibration run measured it. Steps beyond their end are computed.
        decider: An object of your own that decides in place of these rules by its `decide(step: StepView)`: True to
            compute, False to reuse, None for what the rules say (see `policies.decider`).
        fast_dispatch: After one call through Dynamo `enable_cache` serves a module itself, where that is the same: a
            reused step then checks the guards of what it runs and no others. False: Dynamo makes every call. Plain
            `torch.compile` leaves every call to Dynamo.
        shadow: Every step computes, and the statistics say what would have been reused and how far off that would have
            been (`CacheStats.errors`). A step costs up to two, and one more host read.
        debug_dir: A folder that gets the graph before and after every pass, the match report as JSON and a script that
            repeats it; one subfolder per graph.
        max_state_bytes: What all sessions of a transformer may keep together, in bytes: residuals, what the conditional
            looked at, and what a forecaster remembers. Beyond it the generation that was used least recently is
            dropped, and computes anew where it comes back. The one that runs is never dropped, however much it keeps.
            None: any number of bytes.

    Raises:
        ConfigError: (a ValueError) a field has a value it cannot have.
    """

    # Chosen on the digits (docs/quality.md): of what needs nothing known of a model, FoCa is best at every threshold
    # (0.12: 61.9 dB; TaylorSeer of order 1: 58.7; the last residual: 47.2), and 0.12 hardly changes the images.
    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.12
    max_warmup_steps: int = 4
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    max_accumulated_residual_diff_threshold: float | None = None
    num_inference_steps: int | None = None
    steps_computation_mask: Sequence[int] | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    cache_type: str = CacheType.DBCache
    enable_dynamic_prune_threshold: bool = False
    max_dynamic_prune_threshold: float | None = None
    dynamic_prune_threshold_relax_ratio: float = 1.25
    non_prune_block_ids: Sequence[int] = ()
    inner_backend: str = "inductor"
    on_no_match: str = "fallback"
    regions: str = "merged"
    compile_blocks: str = "once"
    mode: str | None = None
    forecaster: Forecaster | None = FoCaCalibratorConfig()  # noqa: RUF009 It cannot be changed.
    reach: str = "blocks"
    probe: str = "fn_residual"
    batch_decision: str = "mean"
    decision_rule: str = "threshold"
    rescale_coefficients: Sequence[float] = ()
    magnitude_ratios: Sequence[float] = ()
    decider: Decider | None = None
    fast_dispatch: bool = True
    shadow: bool = False
    debug_dir: str | os.PathLike[str] | None = None
    max_state_bytes: int | None = 4 * 2**30

    _given_by_class: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        for name, value in fields.items():
            if name not in cls.__dataclass_fields__:
                raise ConfigError(unknown_option(name, value))
        config = super().__new__(cls)
        object.__setattr__(config, "_given", frozenset((*FIELD_NAMES[: len(args)], *fields, *cls._given_by_class)))
        return config

    def __post_init__(self) -> None:
        for name in ("steps_computation_mask", "non_prune_block_ids", "rescale_coefficients", "magnitude_ratios"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "forecaster", as_forecaster("forecaster", self.forecaster))
        if isinstance(self.debug_dir, os.PathLike):
            object.__setattr__(self, "debug_dir", os.fspath(self.debug_dir))
        check_fields(self)

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
        """Names of the fields that the caller set: what a `ParamsModifier` overrides with."""
        names: frozenset[str] = self.__dict__["_given"]
        return names

    @property
    def changes(self) -> Changes:
        """The given fields with their values: unlike two configurations, not equal if one only spells a default out."""
        return tuple((name, getattr(self, name)) for name in sorted(self.given))

    @property
    def structure(self) -> Changes:
        """The fields that a graph is built by, with their values."""
        return tuple((name, getattr(self, name)) for name in FIELD_NAMES if name in STRUCTURAL)

    @property
    def policy(self) -> Changes:
        """All other fields: when to reuse."""
        return tuple((name, getattr(self, name)) for name in FIELD_NAMES if name not in STRUCTURAL)

    def override(self, changes: CacheConfig | Changes | None = None, **fields: Any) -> Self:
        """This configuration with other values: those that another configuration was given, and `fields`.

        `dataclasses.replace` counts every field as given; this one does not.

        Raises:
            ConfigError: A field is unknown or has a value it cannot have.
        """
        changed = dict(changes.changes if isinstance(changes, CacheConfig) else changes or ()) | fields
        return type(self)(**dict(self.changes) | changed)

    def reset(self, **fields: Any) -> Self:
        """A partial configuration, for `ParamsModifier`: of this one nothing is kept, and only `fields` are given."""
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
    def is_static(self) -> bool:
        """Whether a mask alone decides, so that nothing has to be looked at."""
        return self.steps_computation_mask is not None and self.steps_computation_policy == "static"


# What a graph is built by. All else is asked at every step, and may change without compiling anew.
STRUCTURAL = {
    *("Fn_compute_blocks", "Bn_compute_blocks", "cache_type", "non_prune_block_ids"),
    *("inner_backend", "on_no_match", "regions", "compile_blocks", "mode", "shadow", "debug_dir"),
    *("reach", "probe", "batch_decision"),
}
FIELD_NAMES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(CacheConfig))


RECOMMENDED = CacheConfig()  # What every way in starts from, by name.


@dataclass(frozen=True, eq=False)
class DBCacheConfig(CacheConfig):
    """`CacheConfig` with cache-dit's defaults, under cache-dit's name; also called `BasicCacheConfig`.

    Where it overrides another configuration (`override`, `ParamsModifier`, `refresh_context`), its given fields do and
    its defaults do not, as with `CacheConfig`.
    """

    Fn_compute_blocks: int = 8
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 8
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
    ours = {name: value for name, value in options.items() if name in FIELD_NAMES}
    rest = {name: value for name, value in options.items() if name not in FIELD_NAMES}
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
    allowed = [*FIELD_NAMES, *filter(None, [others])]
    return (
        f"cachedit_fx: {what} {name!r} (given {shown(value)}) is unknown."
        f"{did_you_mean(name, (*FIELD_NAMES, *known))}\n{listed([f'Allowed: {allowed[0]}', *allowed[1:]])}."
    )
