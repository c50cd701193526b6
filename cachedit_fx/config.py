"""What can a user set: `CacheConfig`, and how `options=` of `torch.compile` become one."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachedit_fx.errors import ConfigError

_COUNTS = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps")
_LIMITS = ("max_cached_steps", "max_continuous_cached_steps")
_CHOICES = {
    "on_no_match": ("fallback", "raise"),
    "regions": ("merged", "per_list"),
    "compile_blocks": ("once", "inline"),
}


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """When a step may reuse, and how the pieces are compiled. Names and defaults of the first eight are cache-dit's.

    Attributes:
        Fn_compute_blocks: Blocks at the front that always run; the residual over them is what the guard looks at.
        Bn_compute_blocks: Blocks at the end that always run, and so correct what a reused step added.
        residual_diff_threshold: Reuse only if the relative L1 distance between the residual of the Fn blocks now and
            at the last computed step is strictly below this. 0 or less: never reuse. 1 or more: never look.
        max_warmup_steps: The first steps of a session that are computed (strictly fewer than this).
        warmup_interval: During warm-up only every so-many-th step is forced to be computed.
        max_cached_steps: Reused steps per session at the most; -1 for no limit.
        max_continuous_cached_steps: Reused steps in a row at the most; -1 for no limit.
        max_accumulated_residual_diff_threshold: Compute once the diffs of the steps reused since the last computed
            step add up to this; None for no limit.
        inner_backend: The `torch.compile` backend that compiles the pieces.
        on_no_match: "fallback" compiles the uncached graph and warns once; "raise" raises `NoMatchError`.
        regions: "merged" decides once for the whole chain; "per_list" decides for every module list on its own.
        compile_blocks: "once" compiles blocks of equal structure a single time; "inline" compiles head, region and
            tail as one graph each.
        mode: `torch.compile`'s mode for the inner backend (`torch.compile` itself refuses `mode=` beside `options=`).

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
    inner_backend: str = "inductor"
    on_no_match: str = "fallback"
    regions: str = "merged"
    compile_blocks: str = "once"
    mode: str | None = None

    def __post_init__(self) -> None:
        for field in _COUNTS:
            _check_int(field, getattr(self, field), least=0)
        for field in _LIMITS:
            _check_int(field, getattr(self, field), least=-1)
        _check_int("warmup_interval", self.warmup_interval, least=1)
        _check_float("residual_diff_threshold", self.residual_diff_threshold)
        if self.max_accumulated_residual_diff_threshold is not None:
            _check_float("max_accumulated_residual_diff_threshold", self.max_accumulated_residual_diff_threshold)
        for field, allowed in _CHOICES.items():
            _check_choice(field, getattr(self, field), allowed)
        _check_inner_backend(self.inner_backend)
        if self.mode is not None:
            from torch._inductor import list_mode_options

            _check_choice("mode", self.mode, ("default", *sorted(list_mode_options())))


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(CacheConfig))


def split_options(options: Mapping[str, Any], base: CacheConfig | None = None) -> tuple[CacheConfig, dict[str, Any]]:
    """`base` with our options set, and the options that are Inductor's.

    Raises:
        ConfigError: An option is neither ours nor, where the inner backend is Inductor, Inductor's.
    """
    base = base or CacheConfig()
    ours = {name: value for name, value in options.items() if name in OPTION_NAMES}
    rest = {name: value for name, value in options.items() if name not in OPTION_NAMES}
    config = dataclasses.replace(base, **ours)
    known = _inductor_options() if config.inner_backend == "inductor" else ()
    for name, value in rest.items():
        if str(name).replace("-", "_") not in known:
            raise ConfigError(_unknown_option(name, value, known))
    return config, rest


def _inductor_options() -> tuple[str, ...]:
    import torch

    return tuple(torch._inductor.list_options())


def _unknown_option(name: object, value: object, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), (*OPTION_NAMES, *known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    others = ", and every option of Inductor" if known else ""
    return (
        f"cachedit_fx: option {name!r} (given {value!r}) is unknown.{hint} Allowed: {', '.join(OPTION_NAMES)}{others}."
    )


def _check_int(field: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cachedit_fx: {field} must be an int >= {least}, got {value!r}")


def _check_float(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise ConfigError(f"cachedit_fx: {field} must be a finite number, got {value!r}")


def _check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"cachedit_fx: {field} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")


def _check_inner_backend(value: object) -> None:
    from torch._dynamo.backends.registry import list_backends

    allowed = [name for name in list_backends(exclude_tags=()) if name != "cachedit"]
    if not isinstance(value, str):
        raise ConfigError(f"cachedit_fx: inner_backend must be the name of a torch.compile backend, got {value!r}")
    _check_choice("inner_backend", value, tuple(allowed))
