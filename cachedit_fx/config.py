"""What can a user set: `CacheConfig`, and how `options=` of `torch.compile` become one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from cachedit_fx.errors import ConfigError, listed, shown


class CacheType(StrEnum):
    """What is decided about: the middle blocks as one, or every block on its own."""

    DBCache = "DBCache"
    DBPrune = "DBPrune"


_COUNTS = {"Fn_compute_blocks": 0, "Bn_compute_blocks": 0, "max_warmup_steps": 0, "warmup_interval": 1}
_LIMITS = {"max_cached_steps": -1, "max_continuous_cached_steps": -1}
_OPTIONAL_COUNTS = {"num_inference_steps": 1, "force_refresh_step_hint": 1}
_NUMBERS = ("residual_diff_threshold", "dynamic_prune_threshold_relax_ratio")
_OPTIONAL_NUMBERS = ("max_accumulated_residual_diff_threshold", "max_dynamic_prune_threshold")
_SWITCHES = ("cfg_compute_first", "cfg_diff_compute_separate", "enable_dynamic_prune_threshold", "shadow")
_CHOICES = {
    "cache_type": tuple(map(str, CacheType)),
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
    "on_no_match": ("fallback", "raise"),
    "regions": ("merged", "per_list"),
    "compile_blocks": ("once", "inline"),
}


Changes = tuple[tuple[str, Any], ...]  # Names and values of some fields, by name.


@dataclass(frozen=True)
class CacheConfig:
    """When a step may reuse, and how the pieces are compiled. Names, defaults and meaning are cache-dit's up to the
    fields for pruning; those after them are ours. Also called `DBCacheConfig` and `BasicCacheConfig`.

    Attributes:
        Fn_compute_blocks: Blocks at the front that always run; the residual over them is what the guard looks at. 0 is
            for a mask of policy "static": nothing is looked at, and the region is the whole chain.
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
        shadow: Every step computes, and the statistics say what would have been reused and how far off that would have
            been (`CacheStats.errors`). A step costs up to two, and one more host read.
        debug_dir: A folder that gets the graph before and after every pass, the match report as JSON and a script that
            repeats it; one subfolder per graph.

    Raises:
        ConfigError: (a ValueError) a field has a value it cannot have.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 8
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
    shadow: bool = False
    debug_dir: str | os.PathLike[str] | None = None

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        for name, value in fields.items():
            if name not in cls.__dataclass_fields__:
                raise ConfigError(unknown_option(name, value))
        config = super().__new__(cls)
        kind = () if cls is CacheConfig else ("cache_type",)
        object.__setattr__(config, "_given", frozenset((*FIELD_NAMES[: len(args)], *fields, *kind)))
        return config

    def __post_init__(self) -> None:
        for name in ("steps_computation_mask", "non_prune_block_ids"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.debug_dir, os.PathLike):
            object.__setattr__(self, "debug_dir", os.fspath(self.debug_dir))
        _check_fields(self)

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
    def is_static(self) -> bool:
        """Whether a mask alone decides, so that nothing has to be looked at."""
        return self.steps_computation_mask is not None and self.steps_computation_policy == "static"


# What a graph is built by. All else is asked at every step, and may change without compiling anew.
STRUCTURAL = {
    *("Fn_compute_blocks", "Bn_compute_blocks", "cache_type", "non_prune_block_ids"),
    *("inner_backend", "on_no_match", "regions", "compile_blocks", "mode", "shadow", "debug_dir"),
}
FIELD_NAMES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(CacheConfig))


@dataclass(frozen=True)
class DBPruneConfig(CacheConfig):
    """`CacheConfig` with `cache_type="DBPrune"`."""

    cache_type: str = CacheType.DBPrune


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


def check_together(config: CacheConfig) -> None:
    """What one field asks of the others; a partial configuration need not satisfy it.

    Raises:
        ConfigError: No block is left to look at, and nothing decides without looking.
    """
    if config.Fn_compute_blocks == 0 and not config.is_static and config.cache_type != CacheType.DBPrune:
        raise ConfigError(
            "cachedit_fx: Fn_compute_blocks=0 leaves nothing to look at, so it needs steps_computation_mask and "
            f"steps_computation_policy='static', got mask {shown(config.steps_computation_mask)} and policy "
            f"{config.steps_computation_policy!r}.\n"
            "What to do: set both, or Fn_compute_blocks=1 to look at the first block."
        )


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
        f"{_did_you_mean(name, (*FIELD_NAMES, *known))}\n{listed([f'Allowed: {allowed[0]}', *allowed[1:]])}."
    )


def _did_you_mean(value: object, allowed: Sequence[object]) -> str:
    near = difflib.get_close_matches(str(value), list(map(str, allowed)), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check_fields(config: CacheConfig) -> None:
    for name, least in (_COUNTS | _LIMITS).items():
        _check_int(name, getattr(config, name), least=least)
    for name, least in _OPTIONAL_COUNTS.items():
        if getattr(config, name) is not None:
            _check_int(name, getattr(config, name), least=least)
    for name in (*_NUMBERS, *(n for n in _OPTIONAL_NUMBERS if getattr(config, n) is not None)):
        _check_float(name, getattr(config, name))
    for name in (*_SWITCHES, *(("enable_separate_cfg",) if config.enable_separate_cfg is not None else ())):
        _check_choice(name, getattr(config, name), (True, False))
    for name, allowed in _CHOICES.items():
        _check_choice(name, getattr(config, name), allowed)
    mask, kept = config.steps_computation_mask, config.non_prune_block_ids
    if mask is not None and not (isinstance(mask, tuple) and mask and all(m in (0, 1) for m in mask)):
        raise ConfigError(f"cachedit_fx: steps_computation_mask must be a list of 0 and 1, got {shown(mask)}")
    if not isinstance(kept, tuple) or not all(isinstance(i, int) and i >= 0 for i in kept):
        raise ConfigError(f"cachedit_fx: non_prune_block_ids must be a list of ints >= 0, got {shown(kept)}")
    _check_inner_backend(config.inner_backend)
    if config.debug_dir is not None and not (isinstance(config.debug_dir, str) and config.debug_dir):
        raise ConfigError(f"cachedit_fx: debug_dir must be the path of a folder, got {shown(config.debug_dir)}")
    if config.mode is not None:
        from torch._inductor import list_mode_options

        _check_choice("mode", config.mode, ("default", *sorted(list_mode_options())))


def _check_int(field: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cachedit_fx: {field} must be an int >= {least}, got {shown(value)}")


def _check_float(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise ConfigError(f"cachedit_fx: {field} must be a finite number, got {shown(value)}")


def _check_choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if any(value == known and isinstance(value, type(known) | str) for known in allowed):
        return
    hint = _did_you_mean(value, allowed)
    raise ConfigError(f"cachedit_fx: {field} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.{hint}")


def _check_inner_backend(value: object) -> None:
    from torch._dynamo.backends.registry import list_backends

    allowed = [name for name in list_backends(exclude_tags=()) if name != "cachedit"]
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(
            "cachedit_fx: inner_backend must be the name of a torch.compile backend but 'cachedit', as 'inductor', "
            f"'aot_eager' or 'eager', got {shown(value)}.{_did_you_mean(value, allowed)}\n"
            "See all names: torch.compiler.list_backends(exclude_tags=())"
        )
